"""gsrq sign: signs an artifact with a private key."""

from __future__ import annotations

from pathlib import Path

import click

from gsrq_export.artifact.signing import sign_artifact
from gsrq_export.commands.options import artifact_option

PASSWORD_VARIABLE = "GSRQ_SIGN_PASSWORD"


@click.command()
@artifact_option
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help=f"PEM file of an elliptic-curve private key; the password of an encrypted one is read from "
    f"{PASSWORD_VARIABLE}.",
)
@click.option("--password", envvar=PASSWORD_VARIABLE, hidden=True)
def sign(artifact: Path, key: Path, password: str | None) -> None:
    """Verify an artifact and sign all its files. `gsrq verify --key PUBLIC_KEY` checks that (extra: sign)."""
    click.echo(f"{artifact}: signed, {sign_artifact(artifact, key, password or None)}")

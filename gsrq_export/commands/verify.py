"""gsrq verify: is an artifact what its manifest says?"""

from __future__ import annotations

from pathlib import Path

import click

from gsrq_export.artifact.signing import require_signature
from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.commands.options import artifact_option


@click.command()
@artifact_option
@click.option("--quick", is_flag=True, help="Names, sizes, shapes and structure only; no hashes.")
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PEM file of a public key: the artifact must be signed by it (extra: sign).",
)
def verify(artifact: Path, quick: bool, key: Path | None) -> None:
    """Check hashes, sizes, limits and schema. Exit status 2, with every fault listed, if it is not sound."""
    if key is not None:
        report = require_signature(artifact, key, deep=not quick)
    else:
        report = verify_artifact(artifact, deep=not quick)
    click.echo(
        f"{artifact}: sound; {report.files} files, {report.size:,} bytes, "
        f"{'hashes compared' if report.deep else 'hashes not compared'}"
        f"{', signed by this key' if key is not None else ''}"
    )

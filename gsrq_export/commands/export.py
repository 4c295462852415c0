"""gsrq export: an artifact for other hosts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gsrq_export.commands.options import artifact_option
from gsrq_export.export.trtllm import LAUNCHER, export_trtllm


@click.group()
def export() -> None:
    """Write what another host needs to serve an artifact."""


@export.command("trtllm")
@artifact_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new directory.")
@click.option("--max-batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences at a time.")
def trtllm(artifact: Path, out: Path, max_batch_size: int) -> None:
    """Settings and a start script for TensorRT-LLM's AutoDeploy (docs/deploy-trtllm.md)."""
    export_trtllm(artifact, out, max_batch_size)
    click.echo(f"on the serving machine: python {shlex.quote(str(out / LAUNCHER))} 'a prompt'")

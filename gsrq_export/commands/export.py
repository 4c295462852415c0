"""gsrq export: an artifact for other hosts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gsrq_export.commands.options import artifact_option
from gsrq_export.export import trtllm as trtllm_files
from gsrq_export.export import vllm as vllm_files

out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="A new directory."
)


@click.group()
def export() -> None:
    """Write what another host needs to serve an artifact."""


@export.command("trtllm")
@artifact_option
@out_option
@click.option("--max-batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences at a time.")
def trtllm(artifact: Path, out: Path, max_batch_size: int) -> None:
    """Settings and a start script for TensorRT-LLM's AutoDeploy (docs/deploy-trtllm.md)."""
    trtllm_files.export_trtllm(artifact, out, max_batch_size)
    click.echo(f"on the serving machine: python {shlex.quote(str(out / trtllm_files.LAUNCHER))} 'a prompt'")


@export.command("vllm")
@artifact_option
@out_option
def vllm(artifact: Path, out: Path) -> None:
    """A start script for vLLM with the coded cache as its attention backend (docs/deploy-vllm.md)."""
    vllm_files.export_vllm(artifact, out)
    click.echo(f"on the serving machine: bash {shlex.quote(str(out / vllm_files.LAUNCHER))}")

"""gsrq export: an artifact for other hosts."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gsrq_export.commands.options import artifact_option
from gsrq_export.errors import GsrqError
from gsrq_export.export import trtllm as trtllm_files
from gsrq_export.export import vllm as vllm_files
from gsrq_export.export.tensorrt import LIBRARIES, SCRIPT, Limits, export_tensorrt
from gsrq_export.export.tensorrt_plan import build_plan, find_tensorrt
from gsrq_export.export.triton import TritonSettings

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


@export.command("tensorrt")
@artifact_option
@out_option
@click.option("--name", help="The model's name in the Triton repository; default: the artifact's directory's.")
@click.option("--max-batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences in a call.")
@click.option("--max-sequences", type=click.IntRange(1), default=32, show_default=True, help="Sequences held at once.")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Of a sequence, in a call.")
@click.option("--build/--no-build", default=None, help="Also the plan; default: if a full TensorRT is installed.")
def tensorrt(
    artifact: Path,
    out: Path,
    name: str | None,
    max_batch_size: int,
    max_sequences: int,
    max_tokens: int,
    build: bool | None,
) -> None:
    """The graph for TensorRT's parser, trtexec's command and a Triton repository (docs/deploy-tensorrt.md)."""
    trt = find_tensorrt() if build is not False else None
    if build and trt is None:
        raise GsrqError("--build: the module tensorrt is missing, or is not one that builds plans", "install TensorRT")
    settings = TritonSettings(max_batch_size, max_sequences)
    served = name or artifact.resolve().name.replace(".", "_")
    export_tensorrt(artifact, out, Limits(max_batch_size, max_tokens), settings, served)
    if trt is not None:
        click.echo(build_plan(out, trt))
    else:
        click.echo(f"on the serving machine: {shlex.quote(str(out / SCRIPT))}")
    plugin = shlex.quote(str(out / LIBRARIES / "libgsrq_tensorrt10.so"))
    repository = shlex.quote(str(out / "triton"))
    click.echo(f"then: tritonserver --model-repository={repository} --backend-config=tensorrt,plugins={plugin}")

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gsrq_export.errors import GsrqError
from gsrq_export.runtime.session import CUDA, OrtModel

artifact_option = click.option(
    "--artifact",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory that `gsrq build` wrote.",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of one operator; default: all cores.")
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda[:N]",
    help="Where capture, codebooks, refits, fine-tuning and measuring run. With the library of `gsrq plugins build "
    "--cuda` codebooks train on its kernels.",
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu-op", "cuda-op", "onnx-function"]),
    default="auto",
    show_default=True,
    help="cpu-op: the library of `gsrq plugins build`; cuda-op: the same on an NVIDIA GPU (--cuda, onnxruntime-gpu); "
    "onnx-function: standard operators, slow, needs nothing.",
)


def open_model(artifact: Path, threads: int | None, backend: str) -> OrtModel:
    """The artifact in ONNX Runtime, on the backend asked for."""
    provider = CUDA if backend == "cuda-op" else "CPUExecutionProvider"
    model: Any = OrtModel(artifact, threads, None if backend == "onnx-function" else "auto", provider)
    if backend in ("cpu-op", "cuda-op") and model.backend != backend:
        build = "gsrq plugins build" + (" --cuda" if backend == "cuda-op" else "")
        raise GsrqError(f"--backend {backend}: no library is built for this version", f"run `{build}`")
    return model  # type: ignore[no-any-return]

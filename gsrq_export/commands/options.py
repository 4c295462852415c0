"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gsrq_export.errors import GsrqError
from gsrq_export.runtime.session import OrtModel

artifact_option = click.option(
    "--artifact",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory that `gsrq build` wrote.",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of one operator; default: all cores.")
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu-op", "onnx-function"]),
    default="auto",
    show_default=True,
    help="cpu-op: the library of `gsrq plugins build`; onnx-function: standard operators, slow, needs nothing.",
)


def open_model(artifact: Path, threads: int | None, backend: str) -> OrtModel:
    """The artifact in ONNX Runtime, on the backend asked for."""
    model: Any = OrtModel(artifact, threads, None if backend == "onnx-function" else "auto")
    if backend == "cpu-op" and model.backend != "cpu-op":
        raise GsrqError("--backend cpu-op: no library is built for this version", "run `gsrq plugins build`")
    return model  # type: ignore[no-any-return]

"""What both Triton repositories share: names, paths, and the artifact's files in them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto

from gsrq_export.errors import ArtifactError, GsrqError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
LIBRARY = re.compile(r"[A-Za-z0-9_./+@-]{1,255}")


def check_name(name: str) -> None:
    """A served model's name.

    Raises:
        GsrqError: one that no file system, configuration and address can all hold.
    """
    if not NAME.fullmatch(name):
        raise GsrqError(f"triton name {name!r} is not valid", "use up to 64 letters, digits, _ and -, no _ or - first")


def check_library(path: str, field: str) -> None:
    """The custom-op library's path on the server."""
    if not LIBRARY.fullmatch(path):
        raise GsrqError(
            f"{field}: {path!r} has characters that a path should not have here",
            "use letters, digits and . _ / + @ -",
        )


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph without its external data.

    Raises:
        ArtifactError: missing, or not ONNX.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist", "name the directory that a build wrote")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's error type is not public
        raise ArtifactError(f"{path} is not an ONNX model", "build the artifact again") from error


def external_files(model: onnx.ModelProto) -> list[PurePosixPath]:
    """The files, relative to the model, that hold its large tensors.

    Raises:
        ArtifactError: one would lie outside the model's directory.
    """
    found = set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if tensor.data_location == TensorProto.EXTERNAL and entry.key == "location":
                file = PurePosixPath(entry.value if isinstance(entry.value, str) else "")  # not UTF-8: bytes
                if file.is_absolute() or ".." in file.parts or not file.parts or "\\" in entry.value:
                    raise ArtifactError(
                        f"model.onnx: {tensor.name} lies in {entry.value!r}, outside the artifact",
                        "do not use this file",
                    )
                found.add(file)
    return sorted(found)


def model_files(artifact_dir: Path, tokenizer: bool = False) -> list[PurePosixPath]:
    """The artifact's files that a server reads, each of which is there."""
    files = [PurePosixPath("model.onnx"), *external_files(load_graph(artifact_dir / "model.onnx"))]
    if tokenizer:
        folder = artifact_dir / "tokenizer"
        files += [PurePosixPath("tokenizer", path.name) for path in sorted(folder.glob("*")) if path.is_file()]
    for file in files:
        if not (artifact_dir / file).is_file():
            raise ArtifactError(f"{artifact_dir / file} does not exist", "build the artifact again")
    return files


def link_files(artifact_dir: Path, target: Path, files: Sequence[PurePosixPath], texts: Mapping[str, str]) -> Path:
    """Write a model directory: version 1 with hard links to the files (copies where the file system has none).

    All files in it are made read-only, and with them the artifact's own that they are links to.

    Args:
        texts: further files by name in the model directory.
    Raises:
        GsrqError: the directory is there already.
    """
    if target.exists():
        raise GsrqError(f"{target} exists", "remove it or choose another name")
    for file in files:
        place = target / "1" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(artifact_dir / file, place)
        except OSError:
            shutil.copyfile(artifact_dir / file, place)
        place.chmod(0o444)
    for name, text in texts.items():
        (target / name).write_text(text, "utf-8")
        (target / name).chmod(0o444)
    return target

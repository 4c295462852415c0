"""What strangers can hand to gsrq, as functions of bytes: each returns, or raises GsrqError. Anything else is a fault.

Used by tests/test_hostile.py (hypothesis), by tests/fuzz/python_fuzzer.py (atheris), and with the committed corpus.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.artifact.verify import check_codebooks, check_onnx, find_problems
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.errors import GsrqError
from gsrq_export.export.triton import TritonSettings, triton_config
from gsrq_export.export.triton_files import external_files
from gsrq_export.recipe import parse_recipe, resolved_yaml
from gsrq_export.runtime.metadata import CacheMetadata
from gsrq_export.traffic.sources import Tally, read_jsonl, read_text

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "1.0" / "artifact"
CORPUS = Path(__file__).resolve().parent / "corpus"


@lru_cache
def scratch() -> Path:
    """A copy of the golden artifact, in memory where the system has such a place; targets replace a file of it."""
    memory = Path("/dev/shm")
    directory = tempfile.mkdtemp(prefix="gsrq-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    return Path(shutil.copytree(GOLDEN, Path(directory) / "artifact"))


def manifest(data: bytes) -> None:
    path = scratch() / "manifest.json"
    sound = path.read_bytes()
    path.write_bytes(data)
    try:
        load_manifest(scratch())
        find_problems(scratch(), deep=False)
    finally:
        path.write_bytes(sound)


def codebooks(data: bytes) -> None:
    path = scratch() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        check_codebooks(path, load_manifest(GOLDEN))
    except GsrqError:
        load_codebooks(path)  # which reads what was not verified, too
        raise


def recipe(data: bytes) -> None:
    parsed = parse_recipe(data.decode("utf-8", "surrogateescape"), "fuzzed", None)
    assert parse_recipe(resolved_yaml(parsed), "again", None) == parsed


def traffic(data: bytes) -> None:
    for read in (read_jsonl, read_text):
        pieces = read(io.BytesIO(data), "fuzzed", None, Tally())
        try:
            text = "".join(piece.text for piece in pieces)
        except GsrqError:
            continue
        assert len(text.encode()) <= 12 * len(data) + 16


def onnx_file(data: bytes) -> None:
    path = scratch() / "model.onnx"
    path.write_bytes(data)
    check_onnx(path, load_manifest(GOLDEN))
    model = onnx.load(str(path), load_external_data=False)
    external_files(model)
    CacheMetadata.from_properties({p.key: p.value for p in model.metadata_props})


def triton(data: bytes) -> None:
    """A graph of a stranger, made into a Triton configuration: refused, or names what the graph names."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return
    text = triton_config(model, "fuzzed", TritonSettings())
    assert text.count("{") == text.count("}")
    assert text.count('name: "logits"') == 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "codebooks": codebooks,
    "recipe": recipe,
    "traffic": traffic,
    "onnx": onnx_file,
    "triton": triton,
}


def seeds(target: str) -> list[bytes]:
    """The committed corpus of a target, and what the golden artifact and the recipes have for it."""
    own = [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]
    files = {
        "manifest": ["manifest.json"],
        "codebooks": ["codebooks.safetensors"],
        "recipe": ["recipe.resolved.yaml"],
        "onnx": ["model.onnx"],
        "triton": ["model.onnx"],
    }
    return own + [(GOLDEN / name).read_bytes() for name in files.get(target, [])]


def run(target: str, data: bytes) -> bool:
    """Whether the target accepted the data; False: it refused it as it should."""
    try:
        TARGETS[target](data)
    except GsrqError:
        return False
    return True

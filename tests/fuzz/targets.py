"""What strangers can hand to gsrq, as functions of bytes: each returns, or raises GsrqError. Anything else is a fault.

Used by tests/test_hostile.py (hypothesis), by tests/fuzz/python_fuzzer.py (atheris), and with the committed corpus.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import yaml
from google.protobuf.message import DecodeError

from gsrq_export.artifact.manifest import Manifest, load_manifest
from gsrq_export.artifact.verify import check_codebooks, check_onnx, find_problems
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.export.triton import TritonSettings, triton_config
from gsrq_export.export.triton_files import external_files, load_graph
from gsrq_export.recipe import parse_recipe, resolved_yaml, validate_recipe
from gsrq_export.runtime.metadata import CacheMetadata
from gsrq_export.traffic.sources import Tally, read_jsonl, read_text

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "1.0" / "artifact"
FILES = ("manifest.json", "recipe.resolved.yaml", "model.onnx", "model.onnx.data", "codebooks.safetensors")
CORPUS = Path(__file__).resolve().parent / "corpus"


@lru_cache
def scratch(target: str) -> Path:
    """A target's own small artifact, in memory where the system has such a place; the target replaces a file of it.

    It is the golden artifact with less of the same in its graph and its recipe, so that an input does not cost what
    all others cost, too.
    """
    memory = Path("/dev/shm")
    root = tempfile.mkdtemp(prefix="gsrq-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    directory = Path(root) / "artifact"
    directory.mkdir()
    small = {"model.onnx": small_onnx(), "recipe.resolved.yaml": small_recipe(), "manifest.json": small_manifest()}
    for name in FILES:
        (directory / name).write_bytes(small[name] if name in small else (GOLDEN / name).read_bytes())
    return directory


@lru_cache
def small_onnx() -> bytes:
    """The golden graph with its inputs, outputs, initializers and metadata, but few nodes: one of each kind."""
    model = onnx.load(str(GOLDEN / "model.onnx"), load_external_data=False)
    del model.graph.value_info[:]
    owners: list[Any] = [model.graph, *model.functions]
    for owner in owners:
        kinds: dict[tuple[int, ...], onnx.NodeProto] = {}
        for node in owner.node:
            kinds.setdefault(tuple(sorted(attribute.type for attribute in node.attribute)), node)
        del owner.node[:]
        owner.node.extend(kinds.values())
        owners += [attribute.g for node in owner.node for attribute in node.attribute if attribute.HasField("g")]
    return bytes(model.SerializeToString(deterministic=True))


@lru_cache
def small_recipe() -> bytes:
    full = yaml.safe_load((GOLDEN / "recipe.resolved.yaml").read_text())
    return yaml.safe_dump({"name": "x", "model": {"path": "m"}, "cache": full["cache"]}).encode()


@lru_cache
def small_manifest() -> bytes:
    """That of the small artifact."""
    data = json.loads((GOLDEN / "manifest.json").read_bytes())
    sizes = {"model.onnx": len(small_onnx()), "recipe.resolved.yaml": len(small_recipe())}
    data["files"] = {
        name: {**entry, "size": sizes.get(name, entry["size"])}
        for name, entry in data["files"].items()
        if name in FILES
    }
    return json.dumps(data, separators=(",", ":")).encode()


@lru_cache
def sound_manifest() -> Manifest:
    return load_manifest(scratch("sound"))


def manifest(data: bytes) -> None:
    (scratch("manifest") / "manifest.json").write_bytes(data)
    load_manifest(scratch("manifest"))
    if problems := find_problems(scratch("manifest"), deep=False):
        raise ArtifactError(problems[0])


def codebooks(data: bytes) -> None:
    path = scratch("codebooks") / "codebooks.safetensors"
    path.write_bytes(data)
    try:
        check_codebooks(path, sound_manifest())
    except GsrqError:
        load_codebooks(path)  # which reads what was not verified, too
        raise


def recipe(data: bytes) -> None:
    """A recipe's text. What is accepted comes back from its own YAML (of every eighth: that takes most of the time)."""
    parsed = parse_recipe(data.decode("utf-8", "surrogateescape"), "fuzzed", None)
    if zlib.crc32(data) % 8 == 0:
        assert parse_recipe(resolved_yaml(parsed), "again", None) == parsed


def fields(data: bytes) -> None:
    """A recipe's keys and values, as JSON: what YAML would give takes a hundred times as long to read."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GsrqError(str(error)) from None
    if not isinstance(given, dict):
        raise GsrqError("no keys")
    parsed = validate_recipe(given, "fuzzed", None)
    assert validate_recipe(parsed.model_dump(mode="json"), "again", None) == parsed


def traffic(data: bytes) -> None:
    refused: list[GsrqError] = []
    for read in (read_jsonl, read_text):
        pieces = read(io.BytesIO(data), "fuzzed", None, Tally())
        try:
            text = "".join(piece.text for piece in pieces)
        except GsrqError as error:
            refused.append(error)
            continue
        assert len(text.encode()) <= 12 * len(data) + 16
    if len(refused) == 2:
        raise refused[0]


def onnx_file(data: bytes) -> None:
    path = scratch("onnx") / "model.onnx"
    path.write_bytes(data)
    check_onnx(path, sound_manifest())
    model = load_graph(path)
    external_files(model)
    CacheMetadata.from_properties({p.key: p.value for p in model.metadata_props})


def triton(data: bytes) -> None:
    """A graph of a stranger, made into a Triton configuration: refused, or names what the graph names."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise GsrqError(str(error)) from None
    text = triton_config(model, "fuzzed", TritonSettings())
    assert text.count("{") == text.count("}")
    assert text.count('name: "logits"') == 1


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "codebooks": codebooks,
    "recipe": recipe,
    "fields": fields,
    "traffic": traffic,
    "onnx": onnx_file,
    "triton": triton,
}


def seeds(target: str) -> list[bytes]:
    """The committed corpus of a target, and what the small artifact and the recipes have for it."""
    own = [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))]
    made: dict[str, Callable[[], bytes]] = {
        "manifest": small_manifest,
        "codebooks": (GOLDEN / "codebooks.safetensors").read_bytes,
        "recipe": small_recipe,
        "fields": lambda: json.dumps(yaml.safe_load((GOLDEN / "recipe.resolved.yaml").read_text())).encode(),
        "onnx": small_onnx,
        "triton": small_onnx,
    }
    return own + ([made[target]()] if target in made else [])


def run(target: str, data: bytes) -> bool:
    """Whether the target accepted the data; False: it refused it as it should."""
    try:
        TARGETS[target](data)
    except GsrqError:
        return False
    return True

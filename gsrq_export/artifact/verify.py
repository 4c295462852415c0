"""Verification of an artifact: every limit and hash before anything of it is believed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gsrq_export.artifact.manifest import OWN, Manifest, check_name, list_files, load_manifest
from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.export.function import DOMAIN, OPERATOR
from gsrq_export.recipe import parse_recipe
from gsrq_export.stages.keys import file_hash

CODEBOOKS, MODEL, RECIPE = "codebooks.safetensors", "model.onnx", "recipe.resolved.yaml"
REQUIRED = (MODEL, CODEBOOKS, RECIPE)
MAX_HEADER_BYTES = 16 << 20
MAX_ONNX_BYTES = (1 << 31) - 1  # protobuf's own limit
MAX_RECIPE_BYTES = 1 << 20
CHUNK = 1 << 22  # elements checked at once

_TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class Report:
    """Of an artifact that passed."""

    manifest: Manifest
    files: int
    size: int  # bytes, hard links counted each
    deep: bool


def verify_artifact(directory: Path, deep: bool = True) -> Report:
    """Check an artifact; returns only if nothing is wrong.

    Args:
        deep: also compare all hashes and read all codewords; else names, sizes, shapes and structure only.
    Raises:
        ArtifactError: lists everything found wrong.
    """
    problems = find_problems(directory, deep)
    if problems:
        lines = "".join(f"\n  {p}" for p in problems)
        raise ArtifactError(f"artifact {directory} is not sound:{lines}", "do not use it; build or copy it again")
    manifest = load_manifest(directory)
    return Report(manifest, len(manifest.files) + 1, sum(f.size for f in manifest.files.values()), deep)


def find_problems(directory: Path, deep: bool = True) -> list[str]:
    """Everything wrong with an artifact, a line each; empty if it is sound. See `verify_artifact`."""
    try:
        manifest = load_manifest(directory)
        present = list_files(directory) - set(OWN)
    except ArtifactError as error:
        return [error.problem]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    problems = _check_files(directory, manifest, present, deep)
    checks: list[tuple[str, Callable[[Path, Manifest], None]]] = [(RECIPE, _check_recipe)]
    checks += [(name, check_onnx) for name in sorted(manifest.files) if name.endswith(".onnx")]
    checks += [(CODEBOOKS, check_codebooks if deep else _check_shapes)]
    damaged = {problem.split(": ", 1)[0] for problem in problems}
    for name, check in checks:
        # A file that is not the one described is not parsed: its content is nobody's.
        if name in manifest.files and name in present and name not in damaged:
            try:
                check(directory / name, manifest)
            except ArtifactError as error:
                problems.append(f"{name}: {error.problem}")
            except OSError as error:
                problems.append(f"{name}: {error.strerror}")
    return problems


def _check_files(directory: Path, manifest: Manifest, present: set[str], deep: bool) -> list[str]:
    listed = set(manifest.files)
    problems = [f"{name}: missing" for name in sorted(listed - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - listed)]
    problems += [f"{name}: the manifest does not list it" for name in REQUIRED if name not in listed]
    for name in sorted(listed & present):
        entry, size = manifest.files[name], (directory / name).stat().st_size
        if size != entry.size:
            what = "truncated" if size < entry.size else "too long"
            problems.append(f"{name}: {what}: {size} bytes, the manifest says {entry.size}")
        elif deep and file_hash(directory / name) != entry.sha256:
            problems.append(f"{name}: its sha256 is not the manifest's; the file was changed")
    return problems


def _check_recipe(path: Path, manifest: Manifest) -> None:
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ArtifactError(f"over {MAX_RECIPE_BYTES >> 20} MiB")
    try:
        recipe = parse_recipe(path.read_text(encoding="utf-8"), path.name, None)  # a stranger's paths are not looked up
    except (GsrqError, UnicodeDecodeError) as error:
        raise ArtifactError(str(error)) from None
    ours = (*recipe.cache.model_dump().values(), recipe.codec.beam, recipe.codec.key_frame)
    theirs = manifest.cache.model_dump()
    stated = tuple(theirs[name] for name in (*type(recipe.cache).model_fields, "beam", "key_frame"))
    if ours != stated:
        raise ArtifactError(f"its cache rule {ours} is not the manifest's {stated}")


def _expected(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of codebooks.safetensors, from the declared layers."""
    expected: dict[str, tuple[str, list[int]]] = {}
    for index, layer in enumerate(manifest.layers):
        elements = layer.num_kv_heads * layer.head_dim
        for side, entry in (("key", layer.keys), ("value", layer.values)):
            if elements % entry.width:
                raise ArtifactError(f"layer {index}: width {entry.width} does not divide {elements} elements")
            groups, name = elements // entry.width, f"layers.{index}.{side}"
            expected[f"{name}.codewords"] = ("F16", [groups, entry.stages, CODEBOOK_SIZE, entry.width])
            expected[f"{name}.transform"] = ("F32", [groups, entry.width, entry.width])
        if manifest.cache.key_frame == "rotated":
            expected[f"layers.{index}.key.center"] = ("F32", [elements])
    return expected


def _check_shapes(path: Path, manifest: Manifest) -> None:
    for _ in _tensors(path, manifest):
        pass


def check_codebooks(path: Path, manifest: Manifest) -> None:
    """Every tensor is of the type and shape that the manifest's layers say, and finite. Raises ArtifactError."""
    for name, data in _tensors(path, manifest):
        bad = sum(int((~np.isfinite(data[i : i + CHUNK])).sum()) for i in range(0, data.size, CHUNK))
        if bad:
            raise ArtifactError(f"{name}: {bad} of {data.size} entries are NaN or infinite")


def _tensors(path: Path, manifest: Manifest) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every tensor, mapped and not read, once the whole header has been found to be what is declared."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ArtifactError(f"truncated or not safetensors: header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"not safetensors: {error}") from None
    if not isinstance(header, dict):
        raise ArtifactError("not safetensors: its header is no object")
    header.pop("__metadata__", None)
    expected = _expected(manifest)
    if wrong := sorted(set(header) ^ set(expected)):
        raise ArtifactError(f"{len(wrong)} tensors missing or unknown, such as {wrong[0]}")
    start = 8 + length
    end = start
    for name, entry in header.items():
        dtype, shape = expected[name]
        if not isinstance(entry, dict) or entry.get("dtype") != dtype or entry.get("shape") != shape:
            raise ArtifactError(f"{name} is not {dtype} {shape} as the manifest's layers say")
        span = entry.get("data_offsets")
        if not isinstance(span, list) or len(span) != 2 or not all(type(n) is int and n >= 0 for n in span):
            raise ArtifactError(f"{name}: its place in the file is not stated")
        if span[1] - span[0] != math.prod(shape) * _TYPES[dtype].itemsize or start + span[1] > size:
            raise ArtifactError(f"{name}: bytes {span[0]} .. {span[1]} are not its {shape}, or lie outside the file")
        end = max(end, start + span[1])
    spans = sorted(entry["data_offsets"] for entry in header.values())
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)) or end != size:
        raise ArtifactError("tensors overlap, or the file is longer than they are")
    for name, entry in header.items():
        dtype, shape = expected[name]
        offset = start + entry["data_offsets"][0]
        yield name, np.memmap(path, _TYPES[dtype], "r", offset, (math.prod(shape),))


def check_onnx(path: Path, manifest: Manifest) -> None:
    """Structure, operator version, order of codes, and that external data stays in the artifact's own files."""
    root = path
    for _ in range(len(_own_name(path, manifest).split("/"))):
        root = root.parent
    if path.stat().st_size > MAX_ONNX_BYTES:
        raise ArtifactError("over 2 GiB: not a readable ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common type
        raise ArtifactError(f"not ONNX: {error}") from None
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if DOMAIN in versions and versions[DOMAIN] != manifest.op_version:
        raise ArtifactError(f"operator {DOMAIN} version {versions[DOMAIN]}, the manifest says {manifest.op_version}")
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            order = ("token", "head")[any(a.name == "code_order" and a.i for a in node.attribute)]
            if order != manifest.cache.code_order:
                raise ArtifactError(
                    f"node {node.name!r} orders codes by {order}, the manifest says {manifest.cache.code_order}"
                )
    for tensor in _messages(model):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not place:
            continue
        location = place.get("location", "")
        try:
            check_name(location)
        except ArtifactError:
            raise ArtifactError(f"{tensor.name}: external data at {location!r} leaves the artifact") from None
        name = (path.parent / location).relative_to(root).as_posix()
        if name not in manifest.files:
            raise ArtifactError(f"{tensor.name}: external data at {location!r}, which the manifest does not list")
        try:
            offset, length = int(place.get("offset") or 0), int(place.get("length") or 0)
        except ValueError:
            raise ArtifactError(f"{tensor.name}: offset or length of its external data is no number") from None
        if offset < 0 or length < 0 or offset + length > manifest.files[name].size:
            raise ArtifactError(
                f"{tensor.name}: external bytes {offset} .. {offset + length} lie outside {name} "
                f"of {manifest.files[name].size}"
            )


def _own_name(path: Path, manifest: Manifest) -> str:
    posix = path.as_posix()
    return max((name for name in manifest.files if posix.endswith("/" + name)), key=len)


def _messages(message: Any) -> Iterator[Any]:
    """Every TensorProto anywhere in a protobuf message: initializers, attributes, subgraphs, functions, sparse."""
    pending = [message]
    while pending:
        current = pending.pop()
        if isinstance(current, onnx.TensorProto):
            yield current
            continue
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending.extend([value] if hasattr(value, "ListFields") else value)

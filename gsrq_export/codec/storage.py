"""codebooks.safetensors: how an artifact stores its codebooks.

Layer i has layers.{i}.key.codewords, layers.{i}.key.transform and the same of its values, and layers.{i}.key.center
where its keys are coded in the rotated frame; i counts the layers that own a cache. The file is written here, not by
the safetensors package, because that one writes the metadata in a random order and so gives equal codebooks different
hashes; it does read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.errors import GsrqError

SIDES = ("key", "value")
PARTS = ("codewords", "transform")
CODEBOOKS_FILE = "codebooks.safetensors"  # of all layers, in a stage and in an artifact
CENTER = "center"  # a third part, of keys alone
_TYPES = {torch.float16: "F16", torch.float32: "F32"}


def tensor_name(index: int, side: str, part: str) -> str:
    """Name of a tensor in the file and of the ONNX initializer that refers to it."""
    return f"layers.{index}.{side}.{part}"


def _tensors(layers: Sequence[LayerCodebooks]) -> dict[str, torch.Tensor]:
    return {
        tensor_name(i, side, part): tensor
        for i, layer in enumerate(layers)
        for side, book in zip(SIDES, (layer.keys, layer.values), strict=True)
        for part, tensor in book_tensors(book).items()
    }


def book_tensors(book: Codebook) -> dict[str, torch.Tensor]:
    """A codebook's tensors by their part's name."""
    center = {} if book.center is None else {CENTER: book.center}
    return {"codewords": book.codewords, "transform": book.transform, **center}


def save_book(book: Codebook, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one codebook; an intermediate file of a build."""
    save_file(book_tensors(book), path, metadata)


def load_book(path: Path) -> tuple[Codebook, dict[str, str]]:
    """What ``save_book`` wrote."""
    with safe_open(path, framework="pt") as file:
        return Codebook(**{name: file.get_tensor(name) for name in file.keys()}), file.metadata() or {}  # noqa: SIM118


def save_codebooks(path: Path, layers: Sequence[LayerCodebooks], metadata: Mapping[str, str]) -> None:
    """Write the file; equal arguments give equal bytes.

    The file appears whole or not at all: it is written beside its place and renamed.
    """
    tensors = _tensors(layers)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins at a multiple of a cache line
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().numpy().data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tensor_locations(path: Path) -> dict[str, tuple[int, int]]:
    """Offset from the start of the file, and length, of each tensor's bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + size + start, end - start) for name, (start, end) in spans.items()}


def load_codebooks(path: Path) -> list[LayerCodebooks]:
    """Read and check the file.

    Raises:
        GsrqError: absent, truncated or not safetensors; tensors missing, unknown, of a wrong shape or type,
            or not finite.
    """
    mend = "run the build again; the file is damaged, or not one of codebooks"
    if not path.is_file():
        raise GsrqError(f"{path} does not exist", "name the directory that a build wrote")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            # Codebook refuses other types, so nothing is read that was not declared as floats.
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise GsrqError(f"{path}: not a readable safetensors file: {error}", mend) from error
    count = len({name.split(".")[1] for name in names if name.startswith("layers.") and name.count(".") == 3})
    expected = {tensor_name(i, side, part) for i in range(count) for side in SIDES for part in PARTS}
    expected |= {name for i in range(count) if (name := tensor_name(i, "key", CENTER)) in names}
    if not names or names != expected:
        wrong = sorted(names ^ expected)[:3]
        what = "no tensors" if not names else f"tensors missing or unknown, such as {', '.join(wrong)}"
        raise GsrqError(f"{path}: {what}", mend)
    layers = []
    for i in range(count):
        books = []
        for side in SIDES:
            try:
                parts = (tensors.get(tensor_name(i, side, part)) for part in (*PARTS, CENTER))
                books.append(Codebook(*parts))  # type: ignore[arg-type]
            except GsrqError as error:
                raise GsrqError(f"{path}: layers.{i}.{side}: {error.problem}", error.mend or mend) from error
        layers.append(LayerCodebooks(*books))
    return layers

"""The tensors of a safetensors checkpoint, read by name and in parts, so that no more than a part need be in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

from gsrq_export.errors import GsrqError
from gsrq_export.model.loading import weight_files

CHUNK_BYTES = 64 << 20  # of float32 that are converted at a time
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a model's directory. Everything is read as float32, as ``load_model`` does.

    A file is opened anew for each part that is read: its mapped pages count as the process's own while it is open.
    """

    directory: Path

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by name; only headers are read.

        Raises:
            GsrqError: as ``weight_files``.
        """
        found = {}
        for path in weight_files(self.directory):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = Stored(path, str(part.get_dtype()), tuple(part.get_shape()))
        return found

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(stored.elements for stored in self.tensors.values())

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor as float32, some rows of its first axis at a time."""
        stored = self.tensors[name]
        if not stored.shape or not stored.elements:
            yield self._part(stored, name, slice(None))
            return
        rows = max(1, CHUNK_BYTES * stored.shape[0] // (4 * stored.elements))
        for start in range(0, stored.shape[0], rows):
            yield self._part(stored, name, slice(start, start + rows))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor as float32, contiguous; the only copy of it in memory."""
        stored = self.tensors[name]
        out = torch.empty(stored.shape)
        start = 0
        for part in self.chunks(name):
            if not stored.shape:
                return part
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Chosen rows of the first axis as float32; no other page of the file is touched. index: int64 [n]."""
        stored = self.tensors[name]
        with safe_open(stored.file, framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(name)[index].float()
        return rows

    def _part(self, stored: Stored, name: str, rows: slice) -> torch.Tensor:
        with safe_open(stored.file, framework="pt") as file:
            part = file.get_slice(name)[rows] if stored.shape else file.get_tensor(name)
            return part.to(torch.float32, copy=True)  # type: ignore[no-any-return]

    def check_type(self, name: str) -> None:
        """Refuse a tensor that is no float of 16 bits or more.

        Raises:
            GsrqError: names it and its type.
        """
        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise GsrqError(
                f"weight {name} in {stored.file.name} is of type {stored.dtype}",
                f"use a checkpoint of {', '.join(sorted(FLOATS))}; quantized ones are not supported",
            )

"""The cache tensors of a batch, as ONNX Runtime sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from gsrq_export.runtime.metadata import PARTS, CacheMetadata


class CacheBuffers:
    """Zeroed caches with room for a number of coded tokens, whole blocks, which grows by doubling.

    Codes are copied by rows, in either order: a block's lie together, as it is a multiple of the tile.

    Args:
        in_place: one set, bound as input and output (the operator allows it); else two sets that take turns,
            as a graph of standard operators reads its inputs after it has begun to write its outputs.
        device: of ONNX Runtime's naming.
    """

    def __init__(self, metadata: CacheMetadata, batch: int, in_place: bool, device: str) -> None:
        self._metadata = metadata
        self._batch = batch
        self._device = device
        self._in_place = in_place
        self.capacity = metadata.rule.block
        self._now = self._allocate()
        self._next = self._now if in_place else self._allocate()

    @property
    def nbytes(self) -> int:
        sets = [self._now] if self._in_place else [self._now, self._next]
        return sum(value.tensor_size_in_bytes() for values in sets for value in values.values())

    def reserve(self, coded: int) -> None:
        """Make room for ``coded`` coded tokens a row, whole blocks, keeping what is there."""
        if coded <= self.capacity:
            return
        old, old_capacity = self._now, self.capacity
        self.capacity = max(coded, min(2 * self.capacity, self._metadata.full_capacity))
        self._now = {
            name: self._value(name, old[name].numpy(), old_capacity) if "codes" in name else old[name] for name in old
        }
        if self._in_place:
            self._next = self._now
        else:
            exact = {name: value for name, value in self._next.items() if "codes" not in name}
            self._next = {name: exact.get(name) or self._value(name) for name in self._now}

    def bind(self, binding: Any) -> None:
        for name, value in self._now.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", self._next[name])

    def advance(self) -> None:
        """What the last call wrote is what the next one reads."""
        self._now, self._next = self._next, self._now

    def read(self, name: str) -> np.ndarray:
        """A copy of one tensor, by name without ``past.``: "0.key_codes" for instance."""
        return np.array(self._now[name].numpy())

    def _allocate(self) -> dict[str, Any]:
        layers = range(len(self._metadata.layers))
        return {name: self._value(name) for name in (f"{i}.{part}" for i in layers for part in PARTS)}

    def _value(self, name: str, old: np.ndarray | None = None, rows: int = 0) -> Any:
        layer, part = name.split(".")
        shape = self._metadata.shape(int(layer), part, self._batch, self.capacity)
        array = np.zeros(shape, self._metadata.dtype(part))
        if old is not None:
            array[:, :rows] = old
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

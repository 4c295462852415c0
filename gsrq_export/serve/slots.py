"""The cache of all live sequences, a slot each, over which the graph runs for any range of neighbouring slots.

Each cache tensor is one anonymous mapping [slots, ...]. A range of slots is a contiguous part of it, so it is bound to
the graph without a copy, and the operator updates it in place. The mapping is virtual: the system gives memory to a
page of it when the operator first writes there, and gets it back when the slot is released. So a slot costs what its
sequence has filled.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gsrq_export.errors import GsrqError
from gsrq_export.runtime.metadata import PARTS
from gsrq_export.runtime.session import OrtModel


class SlotCache:
    """Slots 0 .. slots - 1, each with room for a sequence of the artifact's max_length.

    Args:
        model: on the CPU; its own caches are not used.
    Raises:
        GsrqError: a model on another device.
    """

    def __init__(self, model: OrtModel, slots: int) -> None:
        if model.backend == "cuda-op":
            raise GsrqError("serving runs on the CPU only", "use the backend cpu-op or onnx-function")
        self.model = model
        self.slots = slots
        self.lengths = np.zeros(slots, np.int64)
        self._in_place = model.backend != "onnx-function"
        metadata = model.metadata
        self._mappings: dict[str, mmap.mmap] = {}
        self._tensors: dict[str, npt.NDArray[Any]] = {}
        for layer in range(len(metadata.layers)):
            for part in PARTS:
                shape = metadata.shape(layer, part, slots, metadata.full_capacity)
                self._allocate(f"{layer}.{part}", shape, metadata.dtype(part))

    def _allocate(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        dtype = np.dtype(kind)
        mapping = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # huge pages would give memory to neighbours' empty slots
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        self._mappings[name] = mapping
        self._tensors[name] = np.frombuffer(mapping, dtype).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all slots would take when full."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the codes of one block in all layers."""
        return self.model.metadata.rule.block * sum(of.key_bytes + of.value_bytes for of in self.model.metadata.layers)

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens."""
        rule = self.model.metadata.rule
        return int(rule.coded(tokens)) // rule.block

    def run(self, first: int, tokens: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Append tokens to the slots from ``first`` on, a row each; a row may be empty.

        Returns:
            logits after each row's last token, float32 [rows, vocab]; without meaning for an empty row.
        """
        rows = len(tokens)
        where = slice(first, first + rows)
        new = np.array([len(row) for row in tokens], np.int64)
        ids = np.zeros((rows, int(new.max())), np.int64)
        for b, row in enumerate(tokens):
            ids[b, : len(row)] = row
        past = np.ascontiguousarray(self.lengths[where])
        index = np.maximum(new - 1, 0)[:, None]
        binding = self.model.session.io_binding()
        feeds = {"input_ids": ids, "past_lengths": past, "new_lengths": new, "logit_indices": index}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        written = {}
        for name, tensor in self._tensors.items():
            part = tensor[where]
            written[name] = part if self._in_place else np.empty_like(part)
            for bind, io, array in (
                (binding.bind_input, "past", part),
                (binding.bind_output, "present", written[name]),
            ):
                bind(f"{io}.{name}", "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self.model.session.run_with_iobinding(binding)
        if not self._in_place:
            for name, array in written.items():
                self._tensors[name][where] = array
        self.lengths[where] += new
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits[:, 0]

    def move(self, source: int, target: int) -> None:
        """Take a sequence to another slot, and release its own."""
        coded = int(self.model.metadata.rule.coded(int(self.lengths[source])))
        for name, tensor in self._tensors.items():
            if name.endswith("codes"):  # whole blocks: in either order of codes the first bytes
                tensor[target, :coded] = tensor[source, :coded]
            else:
                tensor[target] = tensor[source]
        self.lengths[target] = self.lengths[source]
        self.release(source)

    def release(self, slot: int) -> None:
        """Empty a slot; the whole memory pages that it alone has filled go back to the system."""
        self.lengths[slot] = 0
        for name, tensor in self._tensors.items():
            begin, end = slot * tensor[0].nbytes, (slot + 1) * tensor[0].nbytes
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                self._mappings[name].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def read(self, slot: int, name: str) -> npt.NDArray[Any]:
        """A copy of one slot's tensor, "0.key_codes" for instance."""
        return np.array(self._tensors[name][slot])

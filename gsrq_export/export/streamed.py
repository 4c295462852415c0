"""Initializers of an ONNX graph that lie in a checkpoint until the graph is written, and pass through in parts."""

from __future__ import annotations

from typing import BinaryIO

import onnx_ir as ir

from gsrq_export.model.checkpoint import Checkpoint
from gsrq_export.model.streaming import StreamedWeights


class StreamedTensor(ir.LazyTensor):  # type: ignore[misc]
    """A checkpoint's tensor as float32."""

    def __init__(self, checkpoint: Checkpoint, stored: str, name: str) -> None:
        shape = ir.Shape(list(checkpoint.tensors[stored].shape))
        super().__init__(lambda: ir.tensor(checkpoint.read(stored).numpy()), ir.DataType.FLOAT, shape, name=name)
        self.checkpoint, self.stored = checkpoint, stored

    def tofile(self, file: BinaryIO) -> None:
        """Writes it part by part; this is what puts it into external data."""
        for part in self.checkpoint.chunks(self.stored):
            file.write(part.numpy().data)


def refer_to_checkpoint(graph: ir.Model, weights: StreamedWeights) -> None:
    """Replace the placeholders of ``StreamedWeights.placeholders`` that the graph was traced with.

    Args:
        graph: its weights have the model's names for them.
    """
    for name, value in graph.graph.initializers.items():
        storage = getattr(getattr(value.const_value, "raw", None), "untyped_storage", None)
        if storage is None or storage().nbytes() >= value.const_value.nbytes:
            continue
        tensor = StreamedTensor(weights.checkpoint, weights.names[name], name)
        assert tuple(tensor.shape) == tuple(value.const_value.shape), name
        value.const_value = tensor

"""Calls of the C interface on torch tensors: the whole operator or one of its parts, on the current stream."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch

from gsrq_export.cuda.check import ALIGNMENT, FLOATS, CallTensors, check_call
from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.library import DTYPES, CallStruct, LayerStruct
from gsrq_export.errors import GsrqError

Part = Literal["attention", "encode", "attend", "append"]
SIDES = ("keys", "values")
ENCODE_ROWS = 1024  # vectors that the encoder's workspace is sized for; more take turns


class Call:
    """One call, checked, with its output and workspace; may be run again with changed contents of the tensors.

    Args:
        layer: on a CUDA device.
        tensors: on the same device.
        max_total: as CudaLayer.__call__ has it.
    Raises:
        GsrqError: a tensor is not what it must be, or the kernels do not support the call.

    Attributes:
        output: of query's type [B, T, heads, head_dim].
    """

    def __init__(self, layer: CudaLayer, tensors: CallTensors, max_total: int | None = None) -> None:
        total = check_call(layer.shape, tensors, max_total)
        self.layer = layer
        self.tensors = tensors._replace(
            **{name: _aligned(getattr(tensors, name)) for name in ("query", "key", "value")}
        )
        batch, heads, steps, head_dim = tensors.query.shape
        self.output = tensors.query.new_empty(batch, steps, heads, head_dim)
        table = tensors.block_table
        self.struct = CallStruct(
            batch=batch,
            steps=steps,
            dtype=DTYPES[tensors.query.dtype],
            exact_dtype=DTYPES[tensors.key_exact.dtype],
            max_total=total,
            capacity=tensors.capacity,
            page=0 if table is None else tensors.key_codes.shape[1],
            table_stride=0 if table is None else table.shape[1],
            output=self.output.data_ptr(),
            **{name: t.data_ptr() for name, t in self.tensors._asdict().items() if t is not None},
        )
        self._pointer = ctypes.byref(self.struct)
        self._bytes = layer.library.bytes("workspace", layer.pointer, self._pointer)
        self.workspace = torch.empty(max(self._bytes, 1), dtype=torch.uint8, device=layer.shape.device)

    def run(self, part: Part = "attention") -> torch.Tensor:
        """Launch the operator or a part of it on the current stream; returns the output tensor.

        The parts in the operator's order: encode (blocks that leave the window), attend, append (to the ring).
        """
        layer, device = self.layer, self.layer.shape.device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            if part == "append":
                layer.library.run(part, layer.pointer, self._pointer, stream)
            else:
                memory = (layer.prepared.data_ptr(), self.workspace.data_ptr(), self._bytes)
                layer.library.run(part, layer.pointer, self._pointer, *memory, stream)
        return self.output


def encode_vectors(layer: CudaLayer, vectors: torch.Tensor, side: str) -> torch.Tensor:
    """Codes of vectors [..., KV heads * head_dim] on the current stream: int8 [..., code bytes].

    Raises:
        GsrqError: side, type, shape or device is not what it must be.
    """
    code_bytes = check_vectors(layer, vectors, side)
    codes = vectors.new_empty((*vectors.shape[:-1], code_bytes), dtype=torch.int8)
    count = codes.numel() // code_bytes
    if count == 0:
        return codes
    vectors, device = _aligned(vectors), layer.shape.device
    with torch.cuda.device(device):
        size = _encode_workspace(layer, count)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        layer.library.run(
            "encode_vectors",
            layer.pointer,
            SIDES.index(side),
            vectors.data_ptr(),
            DTYPES[vectors.dtype],
            count,
            codes.data_ptr(),
            layer.prepared.data_ptr(),
            workspace.data_ptr(),
            size,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return codes


def check_vectors(layer: CudaLayer, vectors: torch.Tensor, side: str) -> int:
    """Check the arguments of encode_vectors; returns the bytes of a vector's codes."""
    if side not in SIDES:
        raise GsrqError(f"side is {side!r}", f"give {' or '.join(SIDES)}")
    width = layer.shape.kv_heads * layer.shape.head_dim
    if vectors.dtype not in FLOATS or vectors.ndim < 1 or vectors.shape[-1] != width:
        raise GsrqError(
            f"vectors are {vectors.dtype} {list(vectors.shape)}",
            f"give float32, float16 or bfloat16 [..., {width}]: all KV heads of a token",
        )
    if vectors.device != layer.shape.device:
        raise GsrqError(f"vectors are on {vectors.device}, the layer on {layer.shape.device}", "move them there")
    if not vectors.is_contiguous():
        raise GsrqError(f"vectors have strides {list(vectors.stride())}", "make them contiguous")
    return layer.shape.key_bytes if side == "keys" else layer.shape.value_bytes


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _encode_workspace(layer: CudaLayer, count: int) -> int:
    """Bytes for the encoder: what a call would need that codes one token in each of as many rows."""
    struct = LayerStruct.from_buffer_copy(layer.struct)
    struct.sinks, struct.window, struct.block = 0, 0, 1
    struct.codes_by_head = 0  # blocks of one token fill no tiles; nothing is stored
    call = CallStruct(batch=min(count, ENCODE_ROWS), steps=1, max_total=1, capacity=1)
    return layer.library.bytes("workspace", ctypes.byref(struct), ctypes.byref(call))

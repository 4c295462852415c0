"""The operator on a server's flattened tokens and its pages of exact vectors: gsrq_cuda_attention_rows."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from gsrq_export.cuda.check import FLOATS, LayerShape, check_codes, check_tensor
from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.library import DTYPES, CallStruct, RowsStruct
from gsrq_export.errors import GsrqError

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Rows(NamedTuple):
    """Sequences of one call.

    Attributes:
        new: int64 [B], new tokens of each, of which there are at most ``steps``.
        past: int64 [B], tokens of each that are in the cache.
        starts: int64 [B], where its new tokens begin.
        steps: the call's width.
    """

    new: torch.Tensor
    past: torch.Tensor
    starts: torch.Tensor
    steps: int


class ExactPages(NamedTuple):
    """Where rows' exact buffers lie.

    A row's exact keys, then its exact values, each [KV heads, exact slots, head_dim], are the bytes of the keys' parts
    of its pages, one after another, then those of the values' parts.

    Attributes:
        keys, values: int8 [pages, bytes of a page], the parts.
        table: int32 [B, pages of a row].
        dtype: of the vectors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    dtype: torch.dtype


class RowsCall(NamedTuple):
    """One call.

    Attributes:
        tokens: query [tokens, heads, head_dim], key and value [tokens, KV heads, head_dim]; query and key rotated.
        codes: of keys and values, in pages; updated.
        block_table: as gsrq_export.cuda.check.CallTensors says.
        exact: updated. Vectors that no token wrote may be anything.
        output: of query's shape; the rows' tokens are written.
        max_total: as CudaLayer.__call__ has it.
    """

    tokens: Tokens
    rows: Rows
    codes: tuple[torch.Tensor, torch.Tensor]
    block_table: torch.Tensor
    exact: ExactPages
    output: torch.Tensor
    max_total: int | None = None


def check_rows(shape: LayerShape, call: RowsCall) -> Tokens:
    """Check what is not about codes; what lies in the tensors is not checked.

    Returns:
        the tokens, each one's heads together in memory.
    Raises:
        GsrqError: naming the tensor, what it is and what it must be.
    """
    rows, exact, output = call.rows, call.exact, call.output
    batch, (query, key, value) = int(rows.new.shape[0]), call.tokens
    if query.ndim != 3 or query.dtype not in FLOATS:
        raise GsrqError(
            f"query is {query.dtype} {list(query.shape)}", "give float32, float16 or bfloat16 [tokens, heads, head_dim]"
        )
    own, count = (query.dtype,), int(query.shape[0])
    of_query, of_key = (count, shape.heads, shape.head_dim), (count, shape.kv_heads, shape.head_dim)
    dense = (
        _dense("query", query, own, of_query, shape),
        _dense("key", key, own, of_key, shape),
        _dense("value", value, own, of_key, shape),
    )
    if _dense("output", output, own, of_query, shape) is not output:
        raise GsrqError(f"output has strides {list(output.stride())}", "a token's heads must lie together")
    for name, tensor in (("new", rows.new), ("past", rows.past), ("starts", rows.starts)):
        check_tensor(name, tensor, (torch.int64,), (batch,), shape)
    if exact.dtype not in FLOATS:
        raise GsrqError(f"exact vectors are {exact.dtype}", "give float32, float16 or bfloat16")
    check_tensor("exact.keys", exact.keys, (torch.int8,), (None, None), shape, exact.dtype.itemsize)
    check_tensor("exact.values", exact.values, (torch.int8,), (exact.keys.shape[0], None), shape, exact.dtype.itemsize)
    check_tensor("exact.table", exact.table, (torch.int32,), (batch, None), shape)
    pages, sizes = int(exact.table.shape[1]), [int(part.shape[1]) for part in (exact.keys, exact.values)]
    need = shape.exact_bytes(exact.dtype)
    if pages * sum(sizes) < need:
        raise GsrqError(
            f"{pages} pages of {sizes[0]} and {sizes[1]} bytes for {need} bytes of exact vectors a row",
            "give each row as many pages as hold them",
        )
    return dense


def attention_rows(layer: CudaLayer, call: RowsCall) -> None:
    """Append the rows' tokens to their caches and attend, in one call of the library on the current stream.

    Nothing is read from the device, so CUDA graphs capture it.

    Raises:
        GsrqError: a tensor is not what it must be, or the kernels do not support the call.
    """
    query, key, value = check_rows(layer.shape, call)
    rows, exact, output, table = call.rows, call.exact, call.output, call.block_table
    batch, (key_codes, value_codes) = int(rows.new.shape[0]), call.codes
    of_call = CallStruct(
        batch=batch,
        steps=rows.steps,
        dtype=DTYPES[query.dtype],
        exact_dtype=DTYPES[exact.dtype],
        max_total=check_codes(layer.shape, batch, key_codes, value_codes, table, call.max_total),
        past_lengths=rows.past.data_ptr(),
        new_lengths=rows.new.data_ptr(),
        key_codes=key_codes.data_ptr(),
        value_codes=value_codes.data_ptr(),
        block_table=table.data_ptr(),
        page=key_codes.shape[1],
        table_stride=table.shape[1],
    )
    of_rows = RowsStruct(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        output=output.data_ptr(),
        query_stride=query.stride(0),
        key_stride=key.stride(0),
        value_stride=value.stride(0),
        output_stride=output.stride(0),
        starts=rows.starts.data_ptr(),
        key_pages=exact.keys.data_ptr(),
        value_pages=exact.values.data_ptr(),
        key_page_bytes=exact.keys.shape[1],
        value_page_bytes=exact.values.shape[1],
        exact_table=exact.table.data_ptr(),
        exact_stride=exact.table.shape[1],
        exact_pages=exact.table.shape[1],
    )
    library, device, pointer = layer.library, layer.shape.device, ctypes.byref(of_call)
    with torch.cuda.device(device):
        size = library.bytes("rows_workspace", layer.pointer, pointer)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        memory = (layer.prepared.data_ptr(), workspace.data_ptr(), size)
        library.run("attention_rows", layer.pointer, pointer, ctypes.byref(of_rows), *memory, stream)


def _dense(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], layer: LayerShape
) -> torch.Tensor:
    """The tensor, or a copy where a token's heads do not lie together; tokens may be any distance apart."""
    if tensor.ndim == 3 and tensor.stride(1) == shape[2] and tensor.stride(2) == 1:
        check_tensor(name, tensor[:0], dtypes, (0, *shape[1:]), layer)
        if tensor.shape[0] != shape[0]:
            raise GsrqError(f"{name} has {tensor.shape[0]} tokens, query {shape[0]}", "give the same tokens of each")
        return tensor
    dense = tensor.contiguous()
    check_tensor(name, dense, dtypes, shape, layer)
    return dense

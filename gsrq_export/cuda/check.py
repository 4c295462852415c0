"""What a call of the operator must look like, said before anything is launched."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gsrq_export.cache.rule import CODE_TILE, CacheRule
from gsrq_export.errors import GsrqError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes, of the cache tensors


class LayerShape(NamedTuple):
    """What a layer's calls have in common."""

    heads: int
    kv_heads: int
    head_dim: int
    positions: int  # of the rotary table
    key_bytes: int  # a token's codes
    value_bytes: int
    rule: CacheRule
    device: torch.device
    codes_by_head: bool = False

    def exact_bytes(self, dtype: torch.dtype) -> int:
        """Of a row's exact keys and values."""
        return 2 * self.kv_heads * self.rule.exact_slots * self.head_dim * dtype.itemsize


class CallTensors(NamedTuple):
    """The tensors of one call; docs/operator.md has their meaning.

    Attributes:
        query: float32, float16 or bfloat16 [B, heads, T, head_dim], before RoPE.
        key, value: of query's type [B, KV heads, T, head_dim].
        past_lengths, new_lengths: int64 [B].
        key_codes, value_codes: int8 [B, capacity, code bytes]; with a block table [pages, page, code bytes]. Where the
            layer orders codes by head, capacity or page is a multiple of CODE_TILE.
        key_exact, value_exact: float32, float16 or bfloat16 [B, KV heads, exact slots, head_dim].
        block_table: int32 [B, pages of a row]: entry i is the page of coded rows page * i .. page * i + page - 1.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    past_lengths: torch.Tensor
    new_lengths: torch.Tensor
    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_exact: torch.Tensor
    value_exact: torch.Tensor
    block_table: torch.Tensor | None

    @property
    def capacity(self) -> int:
        """Coded tokens that a row has room for."""
        return capacity_of(self.key_codes, self.block_table)


def capacity_of(key_codes: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Coded tokens that a row has room for."""
    rows = int(key_codes.shape[1])
    return rows if block_table is None else rows * int(block_table.shape[1])


def check_call(layer: LayerShape, call: CallTensors, max_total: int | None) -> int:
    """Check all but what lies in the tensors.

    Args:
        max_total: the most tokens a row has after the call; None: as many as the cache and the rotary table hold.
    Returns:
        max_total.
    Raises:
        GsrqError: naming the tensor, what it is and what it must be.
    """
    if call.query.ndim != 4:
        raise GsrqError(f"query has shape {list(call.query.shape)}", "give [batch, heads, tokens, head_dim]")
    batch, steps = int(call.query.shape[0]), int(call.query.shape[2])
    floats = (call.query.dtype,)
    exact = (batch, layer.kv_heads, layer.rule.exact_slots, layer.head_dim)
    check_tensor("query", call.query, FLOATS, (batch, layer.heads, steps, layer.head_dim), layer)
    check_tensor("key", call.key, floats, (batch, layer.kv_heads, steps, layer.head_dim), layer)
    check_tensor("value", call.value, floats, (batch, layer.kv_heads, steps, layer.head_dim), layer)
    check_tensor("past_lengths", call.past_lengths, (torch.int64,), (batch,), layer)
    check_tensor("new_lengths", call.new_lengths, (torch.int64,), (batch,), layer)
    check_tensor("key_exact", call.key_exact, FLOATS, exact, layer, ALIGNMENT)
    check_tensor("value_exact", call.value_exact, (call.key_exact.dtype,), exact, layer, ALIGNMENT)
    return check_codes(layer, batch, call.key_codes, call.value_codes, call.block_table, max_total)


def check_codes(
    layer: LayerShape,
    batch: int,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    block_table: torch.Tensor | None,
    max_total: int | None,
) -> int:
    """The part of `check_call` that is about codes; its arguments, result and errors."""
    rows: tuple[int | None, int | None] = (batch, None)
    if block_table is not None:
        check_tensor("block_table", block_table, (torch.int32,), (batch, None), layer)
        rows = (None, None)
    check_tensor("key_codes", key_codes, (torch.int8,), (*rows, layer.key_bytes), layer, ALIGNMENT)
    same = (int(key_codes.shape[0]), int(key_codes.shape[1]), layer.value_bytes)
    check_tensor("value_codes", value_codes, (torch.int8,), same, layer, ALIGNMENT)
    if block_table is not None and key_codes.shape[1] < 1:
        raise GsrqError("key_codes has pages of no rows", "give [pages, rows a page, code bytes]")
    if layer.codes_by_head and (rows_of_a_page := int(key_codes.shape[1])) % CODE_TILE:
        raise GsrqError(
            f"key_codes has {rows_of_a_page} rows: codes ordered by head lie in tiles of {CODE_TILE} tokens",
            f"give a multiple of {CODE_TILE}, or order codes by token",
        )
    rule, capacity = layer.rule, capacity_of(key_codes, block_table)
    fits = min(layer.positions, capacity // rule.block * rule.block + rule.sinks + rule.window + rule.block - 1)
    if max_total is None:
        return fits
    if not 0 <= max_total <= fits:
        raise GsrqError(
            f"max_total is {max_total}; a cache with room for {capacity} coded tokens a row and a rotary table of "
            f"{layer.positions} positions hold {fits} tokens",
            "enlarge the cache or the table, or shorten the sequence",
        )
    return max_total


def check_lengths(layer: LayerShape, call: CallTensors, max_total: int) -> None:
    """Check what lies in the lengths and the block table. Waits for the GPU where they lie there.

    Raises:
        GsrqError: a negative length, more new tokens than the call has, more tokens than max_total, or an entry
            of the block table that is used and names no page.
    """
    past, new = call.past_lengths.tolist(), call.new_lengths.tolist()
    steps, pages, page = int(call.query.shape[2]), int(call.key_codes.shape[0]), int(call.key_codes.shape[1])
    table = None if call.block_table is None else call.block_table.tolist()
    for b, (before, more) in enumerate(zip(past, new, strict=True)):
        if before < 0 or not 0 <= more <= steps:
            raise GsrqError(
                f"row {b}: past_lengths is {before} and new_lengths {more} of {steps} new tokens",
                "past_lengths must not be negative, new_lengths lie in 0 .. the new tokens",
            )
        if before + more > max_total:
            raise GsrqError(f"row {b}: {before} + {more} tokens exceed {max_total}", "enlarge the cache or max_total")
        if table is not None:
            used = table[b][: -(-layer.rule.coded(before + more) // page)]
            bad = next((entry for entry in used if not 0 <= entry < pages), None)
            if bad is not None:
                raise GsrqError(f"row {b}: block_table names page {bad}", f"pages are 0 .. {pages - 1}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    layer: LayerShape,
    alignment: int = 0,
) -> None:
    """shape: None where any size will do."""
    if tensor.dtype not in dtypes:
        raise GsrqError(f"{name} is {tensor.dtype}", f"give {' or '.join(str(t) for t in dtypes)}")
    have = tuple(tensor.shape)
    if len(have) != len(shape) or any(w is not None and h != w for h, w in zip(have, shape, strict=True)):
        want = ", ".join("any" if w is None else str(w) for w in shape)
        raise GsrqError(f"{name} has shape {list(have)}, not [{want}]", "it must agree with the layer and the query")
    if tensor.device != layer.device:
        raise GsrqError(f"{name} is on {tensor.device}, the layer on {layer.device}", "move it to the layer's device")
    if not tensor.is_contiguous():
        raise GsrqError(f"{name} has strides {list(tensor.stride())}", "make it contiguous")
    if alignment and tensor.data_ptr() % alignment:
        raise GsrqError(f"{name} starts at address {tensor.data_ptr():#x}", f"align it to {alignment} bytes: clone it")

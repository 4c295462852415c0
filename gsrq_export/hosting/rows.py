"""The operator over a server's flattened tokens, which it rotated before attention: keys are coded before RoPE."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gsrq_export.cache.frame import turn_back
from gsrq_export.cache.reference import LayerCache
from gsrq_export.cuda.layer import CudaLayer


class Rows(NamedTuple):
    """Sequences of one call.

    Attributes:
        new: int64 [B], new tokens of each, of which there are at most ``steps``.
        past: int64 [B], tokens of each that are in the cache.
        starts: int64 [B], where its new tokens begin.
        steps: the call's width; 1: nothing is read from the device, so CUDA graphs capture it.
    """

    new: torch.Tensor
    past: torch.Tensor
    starts: torch.Tensor
    steps: int


def attend_rows(
    layer: CudaLayer,
    tokens: tuple[torch.Tensor, ...],
    rows: Rows,
    cache: LayerCache,
    block_table: torch.Tensor,
    output: torch.Tensor,
    max_total: int | None = None,
) -> None:
    """Append the rows' tokens to their caches and attend.

    Args:
        tokens: query [tokens, heads, head_dim], key and value [tokens, KV heads, head_dim]; query and key rotated.
        cache: exact buffers a row, codes in pages; updated.
        block_table: as gsrq_export.cuda.check.CallTensors says.
        output: of query's shape; the rows' tokens are written.
        max_total: as CudaLayer.__call__ has it.
    """
    new, past, starts, steps = rows
    step = torch.arange(steps, device=new.device)
    index = starts[:, None] + step
    real = step < new[:, None]
    index = torch.where(real, index, starts[:, None])  # padding: some token, which nothing reads
    position = (past[:, None] + step).clamp(max=layer.shape.positions - 1)
    query, key, value = (x[index].transpose(1, 2) for x in tokens)
    query, key = (turned_back(x, position, layer).contiguous() for x in (query, key))
    found = layer(query, key, value.contiguous(), past, new, cache, block_table, max_total)
    if steps == 1:
        output.index_copy_(0, starts, found[:, 0])
    else:
        output[index[real]] = found[real]


def turned_back(x: torch.Tensor, position: torch.Tensor, layer: CudaLayer) -> torch.Tensor:
    """Before RoPE: the inverse of the layer's rotation, which scaled tables (yarn) also stretch; in float32.

    Args:
        x: [B, heads, T, head_dim], rotated.
        position: int64 [B, T].
    """
    cos, sin = layer.cos[position], layer.sin[position]
    return turn_back(x.float(), cos, sin, layer.config.rope_interleaved).to(x.dtype)

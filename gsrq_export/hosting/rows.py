"""The operator over a server's flattened tokens, which it rotated before attention: keys are coded before RoPE."""

from __future__ import annotations

import torch

from gsrq_export.cache.frame import turn_back
from gsrq_export.cache.reference import LayerCache
from gsrq_export.cuda.check import LayerShape
from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.rows import ExactPages, RowsCall, attention_rows, check_rows


def attend_rows(layer: CudaLayer, call: RowsCall) -> None:
    """Append the rows' tokens to their caches and attend.

    Raises:
        GsrqError: a tensor is not what it must be.
    """
    run = attention_rows if layer.shape.device.type == "cuda" else attention_rows_plainly
    run(layer, call)


def attention_rows_plainly(layer: CudaLayer, call: RowsCall) -> None:
    """`attend_rows` around the layer's operator, by torch; on any device. What the CUDA library does is held to it."""
    check_rows(layer.shape, call)
    new, past, starts, steps = call.rows
    step = torch.arange(steps, device=new.device)
    index = starts[:, None] + step
    real = step < new[:, None]
    index = torch.where(real, index, starts[:, None])  # padding: some token, which nothing reads
    position = (past[:, None] + step).clamp(max=layer.shape.positions - 1)
    query, key, value = (x[index].transpose(1, 2) for x in call.tokens)
    query, key = (turned_back(x, position, layer).contiguous() for x in (query, key))
    keys, values = read_exact(layer.shape, call.exact, past)
    cache = LayerCache(*call.codes, keys, values)
    found = layer(query, key, value.contiguous(), past, new, cache, call.block_table, call.max_total)
    # Padding goes to a row past the last, which is cut off: to pick what is real would wait for the GPU.
    grown = torch.cat([call.output, call.output[:1]])
    grown[torch.where(real, index, len(call.output))] = found
    call.output.copy_(grown[:-1])
    write_exact(call.exact, keys, values)


def turned_back(x: torch.Tensor, position: torch.Tensor, layer: CudaLayer) -> torch.Tensor:
    """Before RoPE: the inverse of the layer's rotation, which scaled tables (yarn) also stretch; in float32.

    Args:
        x: [B, heads, T, head_dim], rotated.
        position: int64 [B, T].
    """
    cos, sin = layer.cos[position], layer.sin[position]
    return turn_back(x.float(), cos, sin, layer.config.rope_interleaved).to(x.dtype)


def read_exact(shape: LayerShape, exact: ExactPages, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of rows' exact buffers; slots that no token wrote are zero: pages come with anything in them.

    Args:
        past: int64 [B], the rows' tokens.
    Returns:
        keys, values, each [B, KV heads, exact slots, head_dim].
    """
    each = (2, shape.kv_heads, shape.rule.exact_slots, shape.head_dim)
    table = exact.table.long()
    raw = torch.cat([part[table].flatten(1) for part in (exact.keys, exact.values)], 1)
    raw = raw[:, : shape.exact_bytes(exact.dtype)].contiguous()
    unwritten = (shape.rule.slot_tokens(past) < 0)[:, None, None, :, None]
    both = raw.view(exact.dtype).view(-1, *each).masked_fill(unwritten, 0.0)
    # Copies even of one row: the kernels want them aligned.
    keys, values = (both[:, i].clone(memory_format=torch.contiguous_format) for i in range(2))
    return keys, values


def write_exact(exact: ExactPages, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put buffers that `read_exact` gave back into their pages."""
    table = exact.table.long()
    parts = (exact.keys, exact.values)
    split = table.shape[1] * parts[0].shape[1]
    raw = torch.stack([keys, values], 1).flatten(1).view(torch.int8)
    raw = torch.nn.functional.pad(raw, (0, split + table.shape[1] * parts[1].shape[1] - raw.shape[1]))
    for part, bytes_ in zip(parts, (raw[:, :split], raw[:, split:]), strict=True):
        part[table] = bytes_.reshape(*table.shape, part.shape[1])

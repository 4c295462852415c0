"""Calls of the torch operator on any device: layers and tensors of the shared cases, paged copies of caches."""

from __future__ import annotations

from dataclasses import replace

import torch
from attention_cases import TILED, Case, Data

from gsrq_export.cache.reference import AttentionConfig, LayerCache
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cuda import CallTensors, CudaLayer

TILE_CASES = [  # codes by token, in blocks that are whole tiles: by_head() makes the other order of them
    Case("tiles", AttentionConfig(0.25, TILED)),
    Case("tiles, half a head, beam", AttentionConfig(0.25, TILED, beam=3), key_width=32, value_width=8),
    Case("tiles, heads in pairs", AttentionConfig(0.25, TILED), heads=8, kv_heads=4, key_width=32),
    Case("tiles, no window, sliding", AttentionConfig(0.3, CacheRule(0, 0, 8), sliding_window=9)),
    Case("tiles, rotated, exact prefill", AttentionConfig(0.25, TILED, exact_prefill=True), key_width=8, rotated=True),
]


def layer_of_case(case: Case, data: Data, device: str = "cpu") -> CudaLayer:
    return CudaLayer(case.heads, case.head_dim, case.keys, case.values, data.cos, data.sin, case.config, device)


def by_head(case: Case) -> Case:
    """The same with stored codes ordered by head."""
    return replace(case, config=replace(case.config, codes_by_head=True))


def cache_to(cache: LayerCache, device: torch.device | str) -> LayerCache:
    """A copy on the device."""
    return LayerCache(**{name: tensor.to(device, copy=True) for name, tensor in vars(cache).items()})


def paged(cache: LayerCache, page: int, seed: int = 0, spare: int = 3) -> tuple[LayerCache, torch.Tensor]:
    """The cache's codes cut into pages in random order, some of them spare and filled with noise; the block table."""
    batch, capacity = cache.key_codes.shape[:2]
    per_row = -(-capacity // page)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(batch * per_row + spare, generator=generator)[: batch * per_row]
    table = order.reshape(batch, per_row).to(torch.int32)
    pages = []
    for codes in (cache.key_codes, cache.value_codes):
        noise = torch.randint(-128, 128, (batch * per_row + spare, page, codes.shape[2]), generator=generator)
        out = noise.to(torch.int8).to(codes.device)
        whole = out[table.long().to(codes.device)].flatten(1, 2)
        whole[:, :capacity] = codes
        out[table.long().flatten().to(codes.device)] = whole.reshape(-1, page, codes.shape[2])
        pages.append(out)
    return LayerCache(*pages, cache.key_exact.clone(), cache.value_exact.clone()), table.to(cache.key_codes.device)


def linear(cache: LayerCache, table: torch.Tensor, capacity: int) -> LayerCache:
    """What paged() was made of."""
    codes = [c[table.long()].flatten(1, 2)[:, :capacity] for c in (cache.key_codes, cache.value_codes)]
    return LayerCache(*codes, cache.key_exact, cache.value_exact)


def call_tensors(
    data: Data, past: torch.Tensor, new: torch.Tensor, cache: LayerCache, table: torch.Tensor | None = None
) -> CallTensors:
    return CallTensors(data.query, data.key, data.value, past, new, *vars(cache).values(), table)

"""gsrq::slot_attention's work against the reference: sequences in slots, prefilled, continued and decoded together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case, continued
from cuda_calls import TILE_CASES, by_head, cache_to, layer_of_case

from gsrq_export.autodeploy.attention import attend_slots, sequences
from gsrq_export.cache.reference import LayerCache, rotate
from gsrq_export.errors import GsrqError
from gsrq_export.hosting.rows import turned_back

SLOTS, TOKENS = 5, 48
SLOT_OF = (3, 0, 2)
# Calls, each of (sequence, new tokens); one token is decoding.
CALLS = [[(0, 14), (1, 7)], [(2, 11), (0, 1), (1, 1)], [(1, 1), (2, 1), (0, 1)], [(1, 6), (0, 1)], [(2, 1)]]


def batch_info(calls: list[tuple[int, int]], long: bool) -> torch.Tensor:
    prefill = [n for _, n in calls if n > 1]
    decode = len(calls) - len(prefill)
    short = [len(prefill), sum(prefill), decode]
    return torch.tensor([*short[:2], 0, 0, decode, decode, *[7] * 6] if long else short, dtype=torch.int32)


@pytest.mark.parametrize("long", [False, True], ids=["3 numbers", "12 numbers"])
@pytest.mark.parametrize("case", [*CASES, *TILE_CASES], ids=str)
def test_sequences_in_slots_are_what_they_are_alone(case: Case, long: bool) -> None:
    serve_in_slots(case, "cpu", long)


def serve_in_slots(case: Case, device: str, long: bool = False) -> None:
    """CALLS through the operator on a device; outputs and all of the cache are held to the reference's."""
    data = case.data()
    served = by_head(case) if case in TILE_CASES else case
    layer = layer_of_case(served, data, device)
    every = torch.arange(case.steps).expand(case.batch, -1)
    interleaved = case.config.rope_interleaved
    cos, sin = data.cos[every], data.sin[every]
    query, key = (rotate(x, cos, sin, interleaved) for x in (data.query, data.key))
    back = [turned_back(x.to(device), every.to(device), layer).cpu() for x in (query, key)]
    torch.testing.assert_close(back[0], data.query, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back[1], data.key, atol=1e-5, rtol=1e-5)
    before = replace(data, query=back[0], key=back[1])
    rule = case.config.rule
    alone = [
        LayerCache.empty(1, TOKENS, case.kv_heads, case.head_dim, case.keys, case.values, rule, case.exact_dtype)
        for _ in range(case.batch)
    ]
    many = LayerCache.empty(SLOTS, TOKENS, case.kv_heads, case.head_dim, case.keys, case.values, rule, case.exact_dtype)
    many = cache_to(many, device)
    caches = tuple(vars(many).values())
    done = [0] * case.batch
    for call in CALLS:
        call = [(b, n) for b, n in call if b < case.batch]
        if not call:
            continue
        rows = [torch.cat([x[b, :, done[b] : done[b] + n] for b, n in call], 1) for x in (query, key, data.value)]
        total = rows[0].shape[1]
        generate = all(n == 1 for _, n in call)
        flat = [x.transpose(0, 1)[:, None] if generate else x.transpose(0, 1)[None] for x in rows]
        if not generate:  # a server pads what it captured
            flat = [torch.cat([x, torch.full_like(x[:, :2], 9.0)], 1) for x in flat]
        lengths = [n for _, n in call]
        starts = [sum(lengths[:i]) for i in range(len(call))]
        unused = [10**6] * 3
        metadata = [
            torch.tensor([*values, *unused], dtype=torch.int32)
            for values in (lengths, [done[b] for b, _ in call], [SLOT_OF[b] for b, _ in call], [*starts, total])
        ]
        flat, metadata = ([x.to(device) for x in given] for given in (flat, metadata))
        got = attend_slots(layer, tuple(flat), (batch_info(call, long), *metadata), caches)
        assert got.shape == flat[0].shape
        got = got.flatten(0, 1).cpu()
        assert not got[total:].any()
        for (b, n), start in zip(call, starts, strict=True):
            expected, alone[b] = continued(case, before, b, done[b], n, alone[b])
            tolerance = 1e-5 if device == "cpu" else 1e-3  # the kernels multiply float16
            torch.testing.assert_close(got[start : start + n], expected[0], atol=tolerance, rtol=tolerance)
            done[b] += n
    many = served.in_token_order(cache_to(many, "cpu"))
    for b, cache in enumerate(alone):
        coded = rule.coded(done[b])
        for name, tensor in vars(cache).items():
            end = coded if name.endswith("codes") else None
            assert torch.equal(getattr(many, name)[SLOT_OF[b], :end], tensor[0, :end]), (b, name)
    for slot in set(range(SLOTS)) - set(SLOT_OF):
        assert not any(tensor[slot].any() for tensor in caches), "slots of nobody are left alone"


def test_refusals() -> None:
    case = CASES[0]
    layer = layer_of_case(case, case.data())
    with pytest.raises(GsrqError, match="AutoDeploy speculates"):
        sequences(torch.tensor([1, 5, 1, 4, 0, 0, *[0] * 6]))
    with pytest.raises(GsrqError, match="batch_info_host has 4 numbers"):
        sequences(torch.zeros(4, dtype=torch.int32))
    one = torch.zeros(1, 1, case.heads, case.head_dim)
    half = torch.zeros(1, 1, 1, case.head_dim)  # one of two KV heads, as tensor parallelism would have it
    with pytest.raises(GsrqError, match="keys have 1 KV heads of 16, the artifact's layer 2 of 16"):
        attend_slots(layer, (one, half, half), (torch.tensor([0, 0, 1]),), ())

"""What servers call, on a GPU: layers in vLLM's pages and in AutoDeploy's slots over the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, ROTATED, Case
from autodeploy.test_slots import batch_info, serve_in_slots
from cuda_calls import TILE_CASES, by_head, cache_to, layer_of_case
from served_rows import NAN, Pool, step_of
from vllm_backend.test_pages import serve_in_pages

from gsrq_export import CacheRule, native
from gsrq_export.autodeploy.attention import attend_slots
from gsrq_export.cache.reference import AttentionConfig, LayerCache
from gsrq_export.cuda.rows import attention_rows
from gsrq_export.hosting.rows import attention_rows_plainly, read_exact

WIDE = Case(
    "head_dim 128",
    AttentionConfig(0.1, CacheRule(4, 64, 64)),
    heads=8,
    head_dim=128,
    rope_dim=96,
    key_width=128,
    value_width=128,
    key_stages=6,
    steps=420,
    lengths=(420, 420, 420),
    exact_dtype=torch.bfloat16,
)
ROWS = [*CASES, *ROTATED, *TILE_CASES, WIDE, replace(WIDE, name="head_dim 128, rotated", rotated=True)]
STEPS = [[14, 7, 0], [1, 1, 11], [1, 1, 1], [9, 0, 3], [1, 1, 1], [2, 5, 0]]
LONG = [[150, 20, 1], [1, 1, 1], [100, 1, 70], [1, 140, 1], [1, 1, 1]]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.find(native.CUDA) is None, reason="no CUDA library is built: gsrq plugins build --cuda"),
]


@pytest.mark.parametrize("case", [*CASES, *TILE_CASES], ids=str)
def test_sequences_in_vllms_pages_are_what_they_are_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_in_pages(case, "cuda", monkeypatch)


@pytest.mark.parametrize("case", [*CASES, *TILE_CASES], ids=str)
def test_sequences_in_slots_are_what_they_are_alone(case: Case) -> None:
    serve_in_slots(case, "cuda")


@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_decoding_in_slots_is_captured_in_a_graph(case: Case) -> None:
    """A step of one token a sequence, replayed with other tokens, lengths and slots: the same as calls one by one."""
    case, slots, tokens = by_head(case), 5, 48
    data = case.data()
    layer = layer_of_case(case, data, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)

    def empty() -> tuple[torch.Tensor, ...]:
        rule, books = case.config.rule, (case.keys, case.values)
        made = LayerCache.empty(slots, tokens, case.kv_heads, case.head_dim, *books, rule, case.exact_dtype)
        return tuple(vars(cache_to(made, "cuda")).values())

    def vectors() -> list[torch.Tensor]:
        heads = (case.heads, case.kv_heads, case.kv_heads)
        return [torch.randn(2, 1, h, case.head_dim, device="cuda", generator=generator) for h in heads]

    def metadata(past: list[int], slot: list[int]) -> list[torch.Tensor]:
        given = ([1, 1], past, slot, [0, 1, 2])
        return [torch.tensor(values, dtype=torch.int32, device="cuda") for values in given]

    info = batch_info([(0, 1), (1, 1)], long=False)
    steps = [(vectors(), metadata([i, max(i - 3, 0)], [4, 1] if i < 30 else [1, 4])) for i in range(37)]
    for _, given in steps[30:]:  # the sequences change places, as a server may order them
        given[1].copy_(given[1].flip(0))
    expected_caches, caches = empty(), empty()
    expected = [attend_slots(layer, tuple(qkv), (info, *given), expected_caches) for qkv, given in steps]

    qkv, given = ([x.clone() for x in part] for part in steps[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend_slots(layer, tuple(qkv), (info, *given), caches)
    torch.cuda.current_stream().wait_stream(side)
    for cache in caches:
        cache.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend_slots(layer, tuple(qkv), (info, *given), caches)
    for i, (tokens_of, lengths) in enumerate(steps):
        for to, of in zip([*qkv, *given], [*tokens_of, *lengths], strict=True):
            to.copy_(of)
        graph.replay()
        assert torch.equal(output, expected[i]), f"step {i}"
    for found, kept in zip(caches, expected_caches, strict=True):
        assert torch.equal(found, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("spread", [0, 3, 8])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_the_librarys_rows_are_those_of_torch(case: Case, spread: int, dtype: torch.dtype) -> None:
    """Whole calls: the same bits of outputs, codes and exact vectors; nothing else is written."""
    case = by_head(case) if case in TILE_CASES or case.head_dim == 128 else case
    data = case.data()
    layer = layer_of_case(case, data, "cuda")
    pools = [Pool(case, layer) for _ in range(2)]
    done = [0] * case.batch
    for news in LONG if case.head_dim == 128 else STEPS:
        new = [min(n, case.steps - before) for n, before in zip(news, done, strict=False)]
        if not any(new):
            continue
        tokens, rows, output = step_of(case, data, done, new, dtype, "cuda", spread)
        outputs = [output, output.clone()]
        for run, pool, out in zip((attention_rows, attention_rows_plainly), pools, outputs, strict=True):
            pool.attend(run, tokens, rows, out)
        real = torch.zeros(len(output), dtype=torch.bool)
        for start, count in zip(rows.starts.tolist(), new, strict=True):
            real[start : start + count] = True
        assert torch.isfinite(outputs[0][real.cuda()]).all()
        assert outputs[0][~real.cuda()].isnan().all(), "tokens of nobody are left alone"
        assert torch.equal(outputs[0][real.cuda()], outputs[1][real.cuda()])
        done = [n + more for n, more in zip(done, new, strict=True)]
        past = torch.tensor(done, device="cuda")
        exact = [read_exact(layer.shape, pool.exact(), past) for pool in pools]
        for found, kept in zip(*exact, strict=True):
            assert torch.equal(found, kept)
        for found, kept in zip(pools[0].parts, pools[1].parts, strict=True):
            others = torch.ones(len(found), dtype=torch.bool)
            others[pools[0].exact_table.flatten().long().cpu()] = False
            assert torch.equal(found[others.cuda()], kept[others.cuda()])
    assert max(map(case.config.rule.coded, done)) > 0
    used = torch.cat([pools[0].exact_table, pools[0].table], 1).flatten().long()
    for part in pools[0].parts:
        part[used] = NAN
        assert (part == NAN).all(), "pages of nobody are left alone"

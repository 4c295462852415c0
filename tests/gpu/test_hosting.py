"""What servers call, on a GPU: layers in vLLM's pages and in AutoDeploy's slots over the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case
from autodeploy.test_slots import CASES, TILE_CASES, batch_info, serve_in_slots
from cuda_calls import by_head, cache_to, layer_of_case
from vllm_backend.test_pages import serve_in_pages

from gsrq_export import native
from gsrq_export.autodeploy.attention import attend_slots
from gsrq_export.cache.reference import LayerCache

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

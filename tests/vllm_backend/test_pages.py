"""A layer through vLLM's steps against the reference: sequences in pages, prefilled, continued, decoded, preempted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, Case, continued
from cuda_calls import TILE_CASES, by_head, layer_of_case
from vllm_backend import interface

interface.install()

from gsrq_export.cache.reference import LayerCache, rotate  # noqa: E402
from gsrq_export.cache.rule import CODE_TILE, CacheRule  # noqa: E402
from gsrq_export.codec.codebook import LayerCodebooks  # noqa: E402
from gsrq_export.errors import GsrqError  # noqa: E402
from gsrq_export.hosting import layers  # noqa: E402
from gsrq_export.hosting.layers import ArtifactLayer, ArtifactLayers  # noqa: E402
from gsrq_export.hosting.rows import read_exact  # noqa: E402
from gsrq_export.runtime.metadata import CacheMetadata, LayerShape  # noqa: E402
from gsrq_export.vllm import backend  # noqa: E402
from gsrq_export.vllm.pages import LayerPages  # noqa: E402
from gsrq_export.vllm.served import Served  # noqa: E402
from gsrq_export.vllm.spec import GsrqSpec  # noqa: E402

# Steps, each of (sequence, new tokens). A sequence that starts again was preempted: its pages were given away.
STEPS = [
    [(0, 14), (1, 7)],
    [(2, 11), (0, 1), (1, 1)],
    [(1, 1), (2, 1), (0, 1)],
    "1 ends",
    [(0, 3), (2, 5)],
    [(1, 10), (0, 1), (2, 1)],
    [(1, 6), (0, 9)],
    [(2, 1), (1, 1), (0, 1)],
]


def served_case(case: Case, data: Any) -> Served:
    """An artifact's layers, of one layer: the case's."""
    shape = LayerShape(0, case.kv_heads, case.head_dim, case.keys.code_bytes, case.values.code_bytes)
    layer = ArtifactLayer(shape, case.config, LayerCodebooks(case.keys, case.values), data.cos, data.sin)
    dtype = str(case.exact_dtype).removeprefix("torch.")
    metadata = CacheMetadata(case.config.rule, len(data.cos), case.config.exact_prefill, dtype, (shape,))
    return Served(Path("case"), ArtifactLayers(metadata, (layer,)))


@pytest.mark.parametrize("case", [*CASES, *TILE_CASES], ids=str)
def test_sequences_in_pages_are_what_they_are_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_in_pages(case, "cpu", monkeypatch)


def serve_in_pages(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """STEPS through the backend on a device; outputs, values' codes and exact buffers are held to the reference's."""
    data, rule = case.data(), case.config.rule
    served = served_case(case, data)
    serve(served, monkeypatch)
    page = backend.GsrqBackend.get_supported_kernel_block_sizes()[0].base
    spec = backend.GsrqBackend.customize_spec(full_spec(case, page))
    impl = implementation(case)
    builder = builder_of(impl, spec, len(data.cos), device)
    layer = impl.layer
    assert layer is not None
    tiled = case in TILE_CASES
    assert layer.config.codes_by_head == tiled == (rule.block % CODE_TILE == 0)
    # As few pages as the steps need: what a sequence gives back is another's next.
    scheduler = interface.Scheduler(spec, 1 + 3 * spec.pages(case.steps), device)
    pool = scheduler.pool()

    every = torch.arange(case.steps).expand(case.batch, -1)
    query, key = (
        rotate(x, data.cos[every], data.sin[every], case.config.rope_interleaved) for x in (data.query, data.key)
    )
    alone = [empty(case) for _ in range(case.batch)]
    done = [0] * case.batch
    for step in STEPS:
        if isinstance(step, str):
            if case.batch > 1:
                scheduler.end("1")
                alone[1], done[1] = empty(case), 0
            continue
        calls = [(b, min(n, case.steps - done[b])) for b, n in step if b < case.batch and done[b] < case.steps]
        if not calls:
            continue
        flat = [
            torch.cat([x[b, :, done[b] : done[b] + n] for b, n in calls], 1).transpose(0, 1)
            for x in (query, key, data.value)
        ]
        metadata = builder.build(0, scheduler.step([(str(b), n) for b, n in calls]))
        total = flat[0].shape[0]
        # A server pads what it compiled.
        padded = [torch.cat([x, torch.full_like(x[:2], 9.0)]).to(device) for x in flat]
        output = torch.full_like(padded[0], torch.nan)
        got = impl.forward(None, *padded, pool, metadata, output)
        assert got is output
        assert not got[total:].any()
        got, start = got.cpu(), 0
        for b, n in calls:
            expected, alone[b] = continued(case, data, b, done[b], n, alone[b])
            tolerance = 2e-3 if case.exact_dtype != torch.float32 or device != "cpu" else 1e-4
            torch.testing.assert_close(got[start : start + n], expected[0], atol=tolerance, rtol=tolerance)
            done[b] += n
            start += n
    assert max(rule.coded(n) for n in done) >= 2 * rule.block
    for b, cache in enumerate(alone):
        assert scheduler.held(str(b)) == spec.pages(done[b])
        ids = torch.tensor([x.block_id for x in scheduler.manager.req_to_blocks[str(b)]])
        pages = LayerPages(pool.cpu(), layer.shape, case.exact_dtype, spec.exact_pages)
        shape, places = layer.shape, pages.exact(ids[None, : spec.exact_pages].int())
        exact = read_exact(shape, places, torch.tensor([done[b]]))
        for found, kept in zip(exact, (cache.key_exact, cache.value_exact), strict=True):
            torch.testing.assert_close(found, kept, atol=1e-2, rtol=1e-2)
        coded = rule.coded(done[b])
        linear = [c[ids[spec.exact_pages :]].flatten(0, 1)[None] for c in (pages.key_codes, pages.value_codes)]
        stored = (by_head(case) if tiled else case).in_token_order(LayerCache(*linear, *exact))
        assert torch.equal(stored.value_codes[0, :coded], cache.value_codes[0, :coded]), "values are not rotated"


def serve(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the backend serve it; its layers are made anew."""
    monkeypatch.setattr(backend, "served_artifact", lambda: served)
    monkeypatch.setattr(layers, "artifact_layers", lambda _: served.layers)
    monkeypatch.setattr(backend, "torch_layer", layers.torch_layer.__wrapped__)


def implementation(case: Case) -> backend.GsrqImpl:
    return backend.GsrqImpl(
        case.heads,
        case.head_dim,
        case.config.scale,
        case.kv_heads,
        sliding_window=case.config.sliding_window or None,
        logits_soft_cap=case.config.softcap or None,
    )


def builder_of(impl: backend.GsrqImpl, spec: GsrqSpec, longest: int, device: str) -> backend.GsrqBuilder:
    name = "model.layers.0.self_attn.attn"
    config = interface.config_of({name: impl}, longest, chunked=False)
    return backend.GsrqBuilder(spec, [name], config, torch.device(device))


def empty(case: Case) -> LayerCache:
    return LayerCache.empty(
        1, 48, case.kv_heads, case.head_dim, case.keys, case.values, case.config.rule, case.exact_dtype
    )


def full_spec(case: Case, page: int) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=page,
        num_kv_heads=case.kv_heads,
        head_size=case.head_dim,
        head_size_v=case.head_dim,
        dtype=torch.float32,
    )


def spec_of(rule: CacheRule, page: int, exact_pages: int) -> GsrqSpec:
    return GsrqSpec(
        block_size=page,
        num_kv_heads=2,
        head_size=16,
        head_size_v=16,
        dtype=torch.int8,
        num_head_slots=1,
        state_content_bytes=10,
        rule=rule,
        exact_pages=exact_pages,
    )


@pytest.mark.parametrize(
    ("rule", "page"), [(CacheRule(2, 5, 4), 4), (CacheRule(0, 0, 1), 3), (CacheRule(4, 64, 64), 128)]
)
def test_pages_are_those_of_the_cache_rule(rule: CacheRule, page: int) -> None:
    """Every coded token has a place, no page is idle, and vLLM's own rule turns the count into the same pages."""
    spec = spec_of(rule, page, exact_pages=3)
    assert spec.pages(0) == 0
    for tokens in range(1, 600):
        pages = spec.pages(tokens)
        room = (pages - 3) * page
        assert 0 <= room - rule.coded(tokens) < page
        assert -(-spec.as_tokens(tokens) // page) == pages
    config = interface.config_of({}, 500)
    assert spec.max_memory_usage_bytes(config) == spec.pages(500) * page * 10
    assert spec.page_size_bytes == page * 10
    assert spec.max_num_blocks_per_req(config, 77) == spec.pages(77)
    assert type(spec).merge([spec, spec]) == spec


def test_a_pool_of_another_layout_is_refused() -> None:
    case = CASES[0]
    shape = layer_of_case(case, case.data()).shape
    size = shape.key_bytes + shape.value_bytes
    with pytest.raises(GsrqError, match=r"must be dense int8 \[pages, 1, tokens a page, bytes\]"):
        LayerPages(torch.zeros(9, 1, size, 16, dtype=torch.int8).transpose(2, 3), shape, torch.float16, 200)
    with pytest.raises(GsrqError, match="1 pages of 16 tokens of"):
        LayerPages(torch.zeros(9, 1, 16, size, dtype=torch.int8), shape, torch.float16, 1)

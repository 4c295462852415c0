"""The handler under the cache rule: against a query-by-query computation, the plain model, and GSRQ's own cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import random_codebook
from families import tiny_model

from gsrq_export import CacheRule, GsrqError, LayerCodebooks, coded
from gsrq_export.baselines.attention import BaselineAttention, BaselineCache, baseline
from gsrq_export.baselines.base import CacheCodec, LayerCodecs, effective_bits, nominal_bits
from gsrq_export.baselines.calibrate import fit_model, layer_sample
from gsrq_export.baselines.fp8 import Fp8
from gsrq_export.baselines.int4 import TokenHeadCodec
from gsrq_export.baselines.kivi import Kivi, KiviKeys, KiviValues
from gsrq_export.baselines.residual import Residual, ResidualCodec
from gsrq_export.baselines.turboquant import TurboQuant, TurboQuantCodec, rotation
from gsrq_export.cache.frame import rotate
from gsrq_export.capture import Captured, CaptureSettings, capture
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.model.intercept import AttentionCall, RotaryCall
from gsrq_export.model.introspect import LayerSpec, ModelSpec, inspect_model

KV, HEADS, DIM, STEPS = 2, 4, 16, 61
GENERATE = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}


def one_layer(softcap: float, window: int, interleaved: bool) -> ModelSpec:
    layer = LayerSpec(0, 0, HEADS, KV, DIM, 0.3, softcap, window, interleaved, 0)
    angle = torch.arange(64)[:, None] * torch.logspace(0, -2, DIM // 2)
    return ModelSpec((layer,), ((angle.cos(), angle.sin()),), 64)


def calls(parts: list[int]) -> list[AttentionCall]:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, h, STEPS, DIM, generator=generator) for h in (HEADS, KV, KV))
    rotary = RotaryCall(lambda q, k, c, s: (q, k), query, query, DIM)  # the handler rotates by the spec's table
    out, start = [], 0
    for count in parts:
        rows = slice(start, start + count)
        tensors = (x[:, :, rows] for x in (query, key, value))
        out.append(AttentionCall(torch.nn.Identity(), 0, *tensors, 0.3, 0.0, 0, None, None, rotary))
        start += count
    return out


def expected(spec: ModelSpec, codecs: LayerCodecs, rule: CacheRule, exact_prefill: bool) -> torch.Tensor:
    """Each query by itself, each block coded by itself, with loops: [B, T, heads, head_dim]."""
    (call,), layer = calls([STEPS]), spec.layers[0]
    cos, sin = (t[None, :STEPS] for t in spec.rope_tables[0])
    raw, value = call.key.half().float(), call.value.half().float()
    query, key = (rotate(x, cos, sin, layer.rope_interleaved) for x in (call.query, raw))
    out = torch.zeros(2, STEPS, HEADS, DIM)
    for b in range(2):
        seen_keys, seen_values = key[b].clone(), value[b].clone()
        for start in range(rule.sinks, rule.sinks + rule.coded(STEPS), rule.block):
            rows = slice(start, start + rule.block)
            seen_values[:, rows] = codecs.values.reconstruct(value[b, :, rows].transpose(0, 1)).transpose(0, 1)
            source = (key if codecs.keys.frame == "post-rope" else raw)[b, :, rows].transpose(0, 1)
            if codecs.keys.center is not None:
                center = codecs.keys.center.reshape(1, KV, 1, DIM).expand(-1, -1, rule.block, -1)
                center = rotate(center, cos[:, rows], sin[:, rows], layer.rope_interleaved)[0].transpose(0, 1)
                block = (codecs.keys.reconstruct(source - center) + center).transpose(0, 1)
            else:
                block = codecs.keys.reconstruct(source).transpose(0, 1)
            if codecs.keys.frame == "pre-rope":
                block = rotate(block[None], cos[:, rows], sin[:, rows], layer.rope_interleaved)[0]
            seen_keys[:, rows] = block
        for p in range(STEPS):
            coded_until = rule.sinks + rule.coded(1 if exact_prefill else p + 1)
            is_coded = (torch.arange(STEPS) >= rule.sinks) & (torch.arange(STEPS) < coded_until)
            k, v = (torch.where(is_coded[None, :, None], s, e[b]) for s, e in ((seen_keys, key), (seen_values, value)))
            first = max(0, p + 1 - layer.sliding_window) if layer.sliding_window else 0
            for h in range(HEADS):
                score = k[h // 2, first : p + 1] @ query[b, h, p] * layer.scale
                if layer.softcap:
                    score = layer.softcap * torch.tanh(score / layer.softcap)
                out[b, p, h] = score.softmax(0) @ v[h // 2, first : p + 1]
    return out


def pair(name: str) -> LayerCodecs:
    if name == "kivi":
        return LayerCodecs(KiviKeys(2, 4), KiviValues(1, 8))
    if name == "turboquant":
        turn = rotation(DIM, 0, "cpu")
        return LayerCodecs(TurboQuantCodec(2, turn), TurboQuantCodec(1, turn))
    books = (random_codebook(KV * DIM, 16, 3), random_codebook(KV * DIM, 32, 2, 1))
    if name == "rotated":
        center = torch.randn(KV * DIM, generator=torch.Generator().manual_seed(2))
        books = (replace(books[0], center=center), books[1])
    return LayerCodecs(*(ResidualCodec(book) for book in books))


@pytest.mark.parametrize("parts", [[STEPS], [1] * STEPS, [7, 30, 1, 1, 22]], ids=["whole", "steps", "chunks"])
@pytest.mark.parametrize(
    ("name", "rule", "softcap", "window", "interleaved"),
    [
        ("kivi", CacheRule(2, 5, 8), 0.0, 0, False),
        ("turboquant", CacheRule(0, 0, 3), 2.0, 0, True),
        ("residual", CacheRule(3, 1, 5), 0.0, 17, False),
        ("residual", CacheRule(70, 4, 4), 0.0, 0, False),
        ("rotated", CacheRule(3, 1, 5), 0.0, 0, True),
    ],
)
def test_every_query_sees_what_decoding_showed_it(
    name: str, rule: CacheRule, softcap: float, window: int, interleaved: bool, parts: list[int]
) -> None:
    spec, codecs = one_layer(softcap, window, interleaved), pair(name)
    handler = BaselineAttention(spec, [codecs], rule)
    handler.cache = BaselineCache(spec)
    got = torch.cat([handler(call) for call in calls(parts)], 1)
    torch.testing.assert_close(got, expected(spec, codecs, rule, False), atol=2e-5, rtol=1e-4)


def test_exact_prefill_and_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, codecs, rule = one_layer(0.0, 0, False), pair("kivi"), CacheRule(2, 5, 8)
    exact = BaselineAttention(spec, [codecs], rule, exact_prefill=True)(calls([STEPS])[0])
    torch.testing.assert_close(exact, expected(spec, codecs, rule, True), atol=2e-5, rtol=1e-4)
    monkeypatch.setattr("gsrq_export.baselines.attention.QUERY_CHUNK", 9)
    got = BaselineAttention(spec, [codecs], rule)(calls([STEPS])[0])
    torch.testing.assert_close(got, expected(spec, codecs, rule, False), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_continuation_is_scored_in_one_call_as_it_is_decoded(family: str) -> None:
    model = tiny_model(family)
    spec = inspect_model(model, 128)
    codecs = [LayerCodecs(KiviKeys(2, 4), KiviValues(2, 8))] * len(spec.layers)
    ids = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(0))
    rule = CacheRule(2, 8, 4)
    with baseline(model, codecs, rule, exact_prefill=True, spec=spec):
        slow = TorchRunner(model, exact_prefill=True).nll(ids, 40)
        inexact = TorchRunner(model).nll(ids, 40)
    with baseline(model, codecs, rule, exact_prefill=True, prefill_once=True, spec=spec):
        fast = TorchRunner(model).nll(ids, 40)
    torch.testing.assert_close(fast, slow, atol=2e-3, rtol=1e-3)
    assert float((inexact - slow).abs().max()) > 0.05, "a later call must not be seen exactly"


@torch.no_grad()
def test_within_the_window_nothing_changes(family: str) -> None:
    model = tiny_model(family)
    spec = inspect_model(model, 128)
    codecs = [LayerCodecs(TokenHeadCodec(1), TokenHeadCodec(1))] * len(spec.layers)
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    plain, logits = model.generate(ids, **GENERATE), model(ids).logits
    size = float(logits.abs().max())
    with baseline(model, codecs, CacheRule(4, 400, 8), exact_dtype=torch.float32, spec=spec):
        assert torch.equal(plain, model.generate(ids, **GENERATE))
        assert float((model(ids).logits - logits).abs().max()) < 1e-4 * size
    with baseline(model, codecs, CacheRule(2, 8, 4), spec=spec):
        assert float((model(ids).logits - logits).abs().max()) > 0.02 * size, "coding must show"
    assert torch.equal(model(ids).logits, logits), "the context must end"


@torch.no_grad()
@pytest.mark.parametrize("exact_prefill", [False, True])
def test_gsrq_codecs_equal_the_coded_cache(exact_prefill: bool) -> None:
    model = tiny_model("Llama")
    spec = inspect_model(model, 128)
    books = LayerCodebooks(random_codebook(64, 64, 3, 0, True), random_codebook(64, 32, 2, 1))
    codecs = LayerCodecs(ResidualCodec(books.keys, beam=2), ResidualCodec(books.values, beam=2))
    rule = CacheRule(2, 8, 4)
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    results = []
    for context in (
        coded(model, [books] * 3, rule, beam=2, exact_prefill=exact_prefill, spec=spec),
        baseline(model, [codecs] * 3, rule, exact_prefill=exact_prefill, spec=spec),
    ):
        with context:
            first = model(ids[:, :50], use_cache=True)
            second = model(ids[:, 50:], past_key_values=first.past_key_values).logits
            results.append((torch.cat([first.logits, second], 1), model.generate(ids, **GENERATE)))
            searched = model.generate(ids[:1], num_beams=2, **{**GENERATE, "eos_token_id": 2})
            results[-1] += (searched,)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-3, rtol=1e-3)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_effective_bits_by_hand() -> None:
    spec, rule = one_layer(0.0, 0, False), CacheRule(2, 5, 8)
    turboquant, kivi = pair("turboquant"), pair("kivi")
    held = rule.coded(60)  # 48 tokens
    assert held == 48
    elements = 2 * 60 * KV * DIM
    exact = 2 * 15 * KV * DIM * 16
    codes = held * KV * DIM * ((2 + 32 / 4) + (1 + 32 / 8))
    assert effective_bits(spec, [kivi], rule, 60) == pytest.approx((exact + codes) / elements)
    codes = held * KV * DIM * ((2 + 1) + (1 + 1))  # a float16 norm over 16 elements is a bit each
    shared = 8 * 4 * DIM * DIM  # one rotation, though keys and values both use it
    assert effective_bits(spec, [turboquant], rule, 60) == pytest.approx((exact + codes + shared) / elements)
    three = (3 * (exact + codes) + shared) / (3 * elements)  # the rotation once, all else for each sequence
    assert effective_bits(spec, [turboquant], rule, 60, sequences=3) == pytest.approx(three)
    assert nominal_bits(spec, [turboquant]) == pytest.approx((3 + 2) / 2)


def test_a_transform_counts_unless_it_is_the_identity() -> None:
    spec, rule = one_layer(0.0, 0, False), CacheRule(2, 5, 8)
    plain = random_codebook(KV * DIM, 16, 3)
    turned = random_codebook(KV * DIM, 16, 3, 0, True)
    ours, theirs = (LayerCodecs(ResidualCodec(b), ResidualCodec(plain)) for b in (turned, plain))
    difference = effective_bits(spec, [ours], rule, 60) - effective_bits(spec, [theirs], rule, 60)
    words = 8 * 2 * turned.codewords.numel()  # of its own: the plain pair shares one tensor
    transform = 8 * 4 * 2 * 16 * 16
    assert difference == pytest.approx((words + transform) / (2 * 60 * KV * DIM))


def test_fit_model(tmp_path: Path) -> None:
    model = tiny_model("Qwen3")
    spec = inspect_model(model, 64)
    ids = torch.randint(3, 97, (6, 64), generator=torch.Generator().manual_seed(1)).numpy()
    capture(model, spec, ids, CaptureSettings(8, 8, batch=4), tmp_path)
    captured, layer = Captured(tmp_path), spec.layers[1]
    post = layer_sample(captured, spec, layer, "key", Fp8(), 64)
    pre = layer_sample(captured, spec, layer, "key", Residual(), 64)
    cos, sin = (t[:64] for t in spec.rope_tables[0])
    for token in (0, 63, 64, 200):
        row = slice(token % 64, token % 64 + 1)
        turned = rotate(pre.vectors[None, token, :, None], cos[None, row], sin[None, row], False)
        torch.testing.assert_close(post.vectors[token], turned[0, :, 0])
    assert pre.gradient_norms(24).shape == (384, 2)

    held_out = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(2))
    exact = model(held_out).logits
    distance = []
    for method in (Fp8(), TurboQuant(4), Kivi(2, 8), TurboQuant(1)):
        codecs = fit_model(captured, spec, method, 64)
        with torch.no_grad(), baseline(model, codecs, CacheRule(2, 4, 8), spec=spec):
            distance.append(float((model(held_out).logits - exact).square().mean()))
    assert distance == sorted(distance)
    assert 0 < distance[0] < 0.05 * distance[-1]


def test_refusals() -> None:
    class Triples(CacheCodec):
        group_tokens = 3

        def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors

        def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
            return 16

    model = tiny_model("Llama")
    codecs = LayerCodecs(TokenHeadCodec(4), TokenHeadCodec(4))
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with pytest.raises(GsrqError, match="codecs for 2 layers, but the model has 3"), baseline(model, [codecs] * 2):
        pass
    threes = [LayerCodecs(Triples(), TokenHeadCodec(4))] * 3
    with pytest.raises(GsrqError, match=r"cache\.block 64 is not a multiple of the 3 tokens"), baseline(model, threes):
        pass
    with baseline(model, [codecs] * 3):
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with pytest.raises(GsrqError, match="attention_mask marks padding"):
            model(ids, attention_mask=mask)
        with pytest.raises(GsrqError, match="position_ids do not count from 0"):
            model(ids, position_ids=torch.arange(5, 25)[None])
    cache = model(ids, use_cache=True).past_key_values
    with baseline(model, [codecs] * 3), pytest.raises(GsrqError, match="tokens that are not coded"):
        model(ids, past_key_values=cache)
    assert model.config._attn_implementation != "gsrq"

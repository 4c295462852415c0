"""The oracle itself: against attention written from the definition, and its invariances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import BY_HEAD, CASES, ROTATED, Case, continued

from gsrq_export.cache.frame import rotate, to_frame
from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention
from gsrq_export.cache.rule import CODE_TILE, CacheRule
from gsrq_export.errors import GsrqError


@pytest.mark.parametrize("case", [*CASES, *ROTATED, *BY_HEAD], ids=str)
def test_output_is_attention_over_what_each_query_may_see(case: Case) -> None:
    """Each query alone, in a loop: its own list of visible keys, coded or exact, by the words of docs/operator.md."""
    data, config, rule = case.data(), case.config, case.config.rule
    output, after = case.run(data)
    after = case.in_token_order(after)
    dtype = case.exact_dtype
    for b in range(case.batch):
        past, new = 0, int(data.lengths[b])
        key, value = (x[b].to(dtype).float() for x in (data.key, data.value))  # [KV, T, d]
        flat = [x.transpose(0, 1).flatten(1) for x in (key, value)]
        if case.rotated:
            tables = (t[None, :new] for t in (data.cos, data.sin))
            framed = to_frame(key[None, :, :new], case.keys.center, *tables, config.rope_interleaved)
            flat[0] = torch.cat([framed[0].transpose(0, 1).flatten(1), flat[0][new:]])
        books = (case.keys, case.values)
        hat_key, hat_value = (
            book.decode(book.encode(x, config.beam)).reshape(-1, case.kv_heads, case.head_dim)
            for book, x in zip(books, flat, strict=True)
        )
        for i in range(new):
            seen = rule.coded(past + 1) if config.exact_prefill else rule.coded(i + 1)
            for h in range(case.heads):
                n = h // (case.heads // case.kv_heads)
                ks, vs = [], []
                for j in range(i + 1):
                    if config.sliding_window and i - j >= config.sliding_window:
                        continue
                    is_coded = rule.sinks <= j < rule.sinks + seen
                    if is_coded and case.rotated:
                        center = case.keys.center.reshape(case.kv_heads, -1)[n]
                        ks.append(hat_key[j, n] + at(center, j, data, case))
                    else:
                        ks.append(at(hat_key[j, n] if is_coded else key[n, j], j, data, case))
                    vs.append(hat_value[j, n] if is_coded else value[n, j])
                score = torch.stack(ks) @ at(data.query[b, h, i], i, data, case) * config.scale
                if config.softcap:
                    score = config.softcap * torch.tanh(score / config.softcap)
                expected = score.softmax(0) @ torch.stack(vs)
                torch.testing.assert_close(output[b, i, h], expected, atol=2e-5, rtol=1e-4)
        coded = rule.coded(new)
        kept = case.keys.encode(flat[0][rule.sinks : rule.sinks + coded], config.beam)
        assert torch.equal(after.key_codes[b, :coded], kept)
        assert not output[b, new:].any()


def at(x: torch.Tensor, position: int, data: object, case: Case) -> torch.Tensor:
    cos, sin = (t[position][None, None] for t in (data.cos, data.sin))  # type: ignore[attr-defined]
    return rotate(x[None, None, None], cos, sin, case.config.rope_interleaved).flatten()


@pytest.mark.parametrize("case", [c for c in (*CASES, *ROTATED, *BY_HEAD) if not c.config.exact_prefill], ids=str)
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunked_prefill_equals_one_shot(case: Case, chunk: int) -> None:
    data = case.data()
    whole, cache_whole = case.run(data)
    cache, parts = case.empty(), []
    past = torch.zeros(case.batch, dtype=torch.int64)
    for start in range(0, case.steps, chunk):
        rows = slice(start, start + chunk)
        steps = data.key[:, :, rows].shape[2]
        new = (data.lengths - start).clamp(0, steps)
        out, cache = gsrq_attention(
            *(x[:, :, rows] for x in (data.query, data.key, data.value)),
            data.cos,
            data.sin,
            past,
            new,
            cache,
            case.keys,
            case.values,
            case.config,
        )
        past = past + new
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    for name, tensor in vars(cache_whole).items():
        assert torch.equal(tensor, getattr(cache, name)), name


def test_a_later_token_changes_nothing_earlier() -> None:
    case = CASES[0]
    data = case.data()
    before, _ = case.run(data)
    at_token = case.steps // 2
    for tensor in (data.query, data.key, data.value):
        tensor[:, :, at_token:] += 1.0
    after, _ = case.run(data)
    assert torch.equal(before[:, :at_token], after[:, :at_token])
    assert not torch.allclose(before[0, at_token], after[0, at_token])


def test_overflow_is_refused() -> None:
    case = CASES[0]
    data = case.data()
    small = LayerCache.empty(case.batch, 1, case.kv_heads, case.head_dim, case.keys, case.values, CacheRule(0, 0, 1))
    with pytest.raises(ValueError, match="exceed the cache's capacity of 1"):
        case.run(data, small)


@pytest.mark.parametrize("case", BY_HEAD, ids=str)
def test_the_order_of_codes_changes_nothing_else(case: Case) -> None:
    """Several calls into a cache that grows by rows at its end: equal outputs to the bit, the same codes elsewhere."""
    data = case.data()
    twin = replace(case, config=replace(case.config, codes_by_head=False))
    caches = [
        LayerCache(*(x[:1, :0] if x.ndim == 3 else x[:1] for x in vars(c.empty()).values())) for c in (case, twin)
    ]
    past = 0
    for new in (9, 1, case.steps - 12, 1, 1):
        room = case.config.rule.coded(past + new)
        got = []
        for i, of in enumerate((case, twin)):
            more = room - caches[i].key_codes.shape[1]
            codes = [torch.nn.functional.pad(c, (0, 0, 0, more)) for c in (caches[i].key_codes, caches[i].value_codes)]
            caches[i] = replace(caches[i], key_codes=codes[0], value_codes=codes[1])
            output, caches[i] = continued(of, data, 0, past, new, caches[i])
            got.append(output)
        assert torch.equal(*got)
        for name, tensor in vars(case.in_token_order(caches[0])).items():
            assert torch.equal(tensor, getattr(caches[1], name)), name
        past += new
    assert room >= 2 * CODE_TILE
    moved = [not torch.equal(getattr(caches[0], n), getattr(caches[1], n)) for n in ("key_codes", "value_codes")]
    total = case.kv_heads * case.head_dim
    assert moved == [max(book.width, case.head_dim) < total for book in (case.keys, case.values)]


def test_what_no_tiles_fill_is_refused() -> None:
    with pytest.raises(GsrqError, match="block = 12: codes ordered by head lie in tiles of 8 tokens"):
        AttentionConfig(1.0, CacheRule(2, 5, 12), codes_by_head=True)
    case = BY_HEAD[0]
    cache = case.empty()
    odd = LayerCache(cache.key_codes[:, :31], cache.value_codes[:, :31], cache.key_exact, cache.value_exact)
    with pytest.raises(ValueError, match="a capacity of 31 is no multiple of 8"):
        case.run(case.data(), odd)

"""The transformers cache: generation, chunked prefill, padding, beam search and refusals, over all families."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import random_codebook
from families import tiny_model

from gsrq_export import CacheRule, GsrqError, LayerCodebooks, coded
from gsrq_export.model.introspect import inspect_model

RULE = CacheRule(2, 8, 4)
GENERATE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}


def double_llama() -> torch.nn.Module:
    """In float64, where another order of summation does not decide between near codewords."""
    return tiny_model("Llama").double()


def codebooks(model: torch.nn.Module, rotated: bool = False) -> list[LayerCodebooks]:
    layers = inspect_model(model, 128).layers
    total = layers[0].num_kv_heads * layers[0].head_dim
    keys = random_codebook(total, total, 3)
    values = random_codebook(total, layers[0].head_dim, 2, seed=1)
    if rotated:
        keys = replace(keys, center=torch.randn(total, generator=torch.Generator().manual_seed(5)))
    return [LayerCodebooks(keys, values) for _ in layers]


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    return ids, mask


@torch.no_grad()
def test_generation(family: str) -> None:
    model = tiny_model(family)
    books = codebooks(model)
    ids, mask = padded_batch()
    plain = model.generate(ids, attention_mask=mask, **GENERATE)
    with coded(model, books, CacheRule(4, 400, 8), exact_dtype=torch.float32):
        uncoded = model.generate(ids, attention_mask=mask, **GENERATE)
    assert torch.equal(plain, uncoded), "with all tokens in the window nothing may change"

    with coded(model, books, RULE):
        whole = model(ids[:1]).logits
        first = model(ids[:1, :50], use_cache=True)
        second = model(ids[:1, 50:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, atol=1e-3, rtol=1e-3)
        batch = model.generate(ids, attention_mask=mask, **GENERATE)
        alone = model.generate(ids[1:, 21:], **GENERATE)
        assert torch.equal(batch[1, 21:], alone[0]), "padding must not matter"
    assert not torch.allclose(whole, model(ids[:1]).logits, atol=1e-2), "coding must show; the context must end"


@torch.no_grad()
@pytest.mark.parametrize("rotated", [False, True])
def test_token_by_token_equals_prefill(rotated: bool) -> None:
    model = double_llama()
    ids = padded_batch()[0][:1]
    with coded(model, codebooks(model, rotated), RULE):
        whole = model(ids).logits
        cache, steps = None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-3, rtol=1e-3)
    held = 70 - 2 - 8
    bytes_a_layer = (held // 4 * 4) * (3 + 4) + 2 * 2 * 64 * 14
    assert cache.bytes() == 3 * bytes_a_layer


@torch.no_grad()
def test_padding_does_not_shift_rotated_keys() -> None:
    model = double_llama()
    ids, mask = padded_batch()
    with coded(model, codebooks(model, rotated=True), RULE):
        batch = model.generate(ids, attention_mask=mask, **GENERATE)
        assert torch.equal(batch[1, 21:], model.generate(ids[1:, 21:], **GENERATE)[0])
        found = model(ids).logits
    with coded(model, codebooks(model), RULE):
        assert not torch.allclose(found, model(ids).logits, atol=1e-2), "the frame must show"


@torch.no_grad()
def test_beam_search_reorders_the_cache() -> None:
    model = tiny_model("Llama")
    ids = padded_batch()[0][:1]
    plain = model.generate(ids, num_beams=3, **{**GENERATE, "eos_token_id": 2})
    with coded(model, codebooks(model), CacheRule(4, 400, 8), exact_dtype=torch.float32):
        assert torch.equal(plain, model.generate(ids, num_beams=3, **{**GENERATE, "eos_token_id": 2}))


def test_refusals() -> None:
    model = tiny_model("Llama")
    books = codebooks(model)
    ids, mask = padded_batch()
    with pytest.raises(GsrqError, match="codebooks for 2 layers, but the model has 3"), coded(model, books[:2]):
        pass
    with pytest.raises(GsrqError, match="beam = 257: out of range"), coded(model, books, beam=257):
        pass
    with coded(model, books), pytest.raises(GsrqError, match="position_ids"):
        model(ids, attention_mask=mask)  # left padding without position_ids
    other = tiny_model("Llama", num_key_value_heads=4)
    with pytest.raises(GsrqError, match="codes 64 elements, the layer's KV heads have 128"), coded(other, books):
        pass
    assert model.config._attn_implementation != "gsrq"

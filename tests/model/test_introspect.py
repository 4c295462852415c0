"""Which models are recognised, what is found of them, and which are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import SMALL, tiny_model

from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.model import introspect
from gsrq_export.model.intercept import intercept
from gsrq_export.model.introspect import inspect_model


def test_every_family_is_recognised(family: str) -> None:
    model = tiny_model(family)
    spec = inspect_model(model, 100)
    config = model.config
    assert [layer.layer_idx for layer in spec.layers] == list(range(config.num_hidden_layers))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in spec.layers:
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, head_dim)
        assert layer.rope_interleaved == (family in ("Cohere", "Glm"))
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    assert spec.rope_tables[0][0].shape == (100, int(head_dim * share) // 2)
    assert len(spec.rope_tables) == 1


def test_sliding_layers_and_softcap() -> None:
    spec = inspect_model(tiny_model("Gemma2", sliding_window=8), 64)
    assert [layer.sliding_window for layer in spec.layers] == [8, 0, 8, 0]
    assert {layer.softcap for layer in spec.layers} == {50.0}


def test_two_rotary_tables() -> None:
    config = transformers.Gemma3TextConfig(**{**SMALL, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6})
    torch.manual_seed(0)
    spec = inspect_model(transformers.Gemma3ForCausalLM(config).eval(), 64)
    assert [layer.rope_table for layer in spec.layers] == [0, 0, 0, 0, 0, 1]
    assert not torch.equal(spec.rope_tables[0][0], spec.rope_tables[1][0])


def test_rope_scaling_reaches_the_table() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    scaled = inspect_model(tiny_model("Llama", rope_parameters=rope), 64).rope_tables[0][0]
    plain = inspect_model(tiny_model("Llama"), 64).rope_tables[0][0]
    torch.testing.assert_close(scaled[::4], plain[:16], atol=1e-6, rtol=0)


MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("DeepseekV3", MLA, "latent attention"),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4}, "s_aux"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 1]}, "layer 1 attends without a rotary embedding"),
        ("GPT2", {}, "no function apply_rotary_pos_emb"),
    ],
)
def test_unsupported_models_are_refused(family: str, options: dict[str, object], message: str) -> None:
    if family == "GPT2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2)).eval()
    else:
        model = tiny_model(family, **options)
    with pytest.raises(UnsupportedModelError, match=message):
        inspect_model(model, 64)


def test_a_layer_that_escapes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with one layer of its own attention must be refused as a whole."""
    model = tiny_model("Llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def own(hidden_states: torch.Tensor, past_key_values: object = None, **kwargs: object) -> object:
        if past_key_values is None:
            return hidden_states * 0, None
        return original(hidden_states=hidden_states, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(attention, "forward", own)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\] own a cache but did not pass"):
        inspect_model(model, 64)


def test_wrong_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = introspect._plain_attention
    monkeypatch.setattr(introspect, "_plain_attention", lambda call: plain(call) * 1.05)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        inspect_model(tiny_model("Llama"), 64)


def test_lengths_over_the_models_are_refused() -> None:
    with pytest.raises(GsrqError, match="max_length 4096 is over the model's 512"):
        inspect_model(tiny_model("Llama"), 4096)


def test_an_error_restores_the_model() -> None:
    model = tiny_model("Qwen2")
    before = model(torch.arange(9)[None]).logits

    def fail(call: object) -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), intercept(model, fail):
        model(torch.arange(9)[None])
    assert torch.equal(before, model(torch.arange(9)[None]).logits)

"""Tiny random decoders of the supported families, and where things lie."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {"head_dim": 32},
    "Mistral": {"sliding_window": 40, "head_dim": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Gemma": {"head_dim": 32},
    "Gemma2": {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16, "num_hidden_layers": 4},
    "Phi3": {"partial_rotary_factor": 0.5},
    "Cohere": {},
    "Glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
}


def tiny_model(family: str, seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A random decoder of a family, float32, eval; weights are large enough that attention is not uniform."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SMALL, **FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    return model

"""Published configurations of the models that recipes come along for, as far as a cache depends on them.

Transcribed by hand from each model's config.json on the Hugging Face hub, in that file's own words, and compared with
the dimensions that litgpt's table of models gives for them. longrope's 48 factors a list are left out: they are the
model's, and no recipe states them; ones stand in their place.
"""

from __future__ import annotations

from typing import Any

LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
MISTRAL: dict[str, Any] = {
    **LARGE,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

# By recipe: the model's id, and its configuration.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        {**LLAMA3, **LARGE, "max_position_embeddings": 8192, "rope_scaling": None},
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        {**LLAMA3, **LARGE, "max_position_embeddings": 131072, "rope_scaling": {**LLAMA3_SCALING, "factor": 8.0}},
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        {
            **LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        {
            **LLAMA3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral-7b-v0.1": (
        "mistralai/Mistral-7B-v0.1",
        {**MISTRAL, "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096},
    ),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        {**MISTRAL, "vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None},
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B",
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": (
        "Qwen/Qwen3-8B",
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "max_window_layers": 36,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    ),
    "gemma-2-9b": (
        "google/gemma-2-9b",
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
    ),
    "phi-3-mini-4k": (
        "microsoft/Phi-3-mini-4k-instruct",
        {**PHI3, "max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047},
    ),
    "phi-3-mini-128k": (
        "microsoft/Phi-3-mini-128k-instruct",
        {
            **PHI3,
            "max_position_embeddings": 131072,
            "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "sliding_window": 262144,
        },
    ),
}

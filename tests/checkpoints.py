"""Tiny random checkpoints on disk, as large ones come: bfloat16, in several files, some with tied embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_model

from gsrq_export.model.byte_tokenizer import VOCABULARY, byte_tokenizer

STREAMED = {  # families and what of each is unlike the others
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"hidden_size": 40, "sliding_window": 8},  # windows in every other layer, capped scores; always tied
    "Phi3": {},  # fused projections, partial rotary embedding
    "Cohere": {},  # interleaved rotary pairs, layers whose two halves run side by side
}


def write_checkpoint(family: str, directory: Path, **overrides: object) -> Path:
    """A model of three or four layers in ``directory``."""
    changes = {"vocab_size": VOCABULARY + 7, **STREAMED.get(family, {}), **overrides}
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim < 2:
                weight.add_(0.1 * torch.randn_like(weight))
    model.bfloat16().save_pretrained(directory, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(directory)
    return directory

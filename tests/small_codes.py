"""Random codebooks and tokens for tiny models whose keys and values are to be really coded."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import random_codebook
from tokenizers.processors import TemplateProcessing

from gsrq_export import CacheRule, LayerCodebooks
from gsrq_export.model.introspect import inspect_model

RULE = CacheRule(2, 8, 4)


def codebooks(model: torch.nn.Module) -> list[LayerCodebooks]:
    layers = inspect_model(model, 128).layers
    total = layers[0].num_kv_heads * layers[0].head_dim
    return [LayerCodebooks(random_codebook(total, total, 3), random_codebook(total, total, 2, 1)) for _ in layers]


def token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def with_start_token(tokenizer: Any) -> Any:
    """The tokenizer of byte_tokenizer.py, putting token 0 before every text."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.bos_token = "<eos>"
    return tokenizer

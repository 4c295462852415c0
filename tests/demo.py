"""The trained demo model and text sampled from it: held-out text that the project can always make itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ROOT, SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer


def demo_directory() -> Path:
    for path in (ROOT / "assets" / "demo-6m", SHARED / "models" / "demo-6m"):
        if (path / "model.safetensors").is_file():
            return path
    pytest.skip("the trained model demo-6m is neither in assets/ nor in the shared models")


@lru_cache
def demo() -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    path = demo_directory()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@lru_cache
def demo_text() -> str:
    model, tokenizer = demo()
    torch.manual_seed(0)
    start = torch.zeros(12, 1, dtype=torch.int64)
    with torch.inference_mode():
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=256,
            eos_token_id=[],
            pad_token_id=0,
        )
    return "\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))

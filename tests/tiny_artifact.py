"""Small exported models, made once a test session and kind."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from attention_cases import random_codebook
from families import tiny_model

from gsrq_export import CacheRule, LayerCodebooks
from gsrq_export.export.model import export_onnx
from gsrq_export.export.trace import ExportSettings
from gsrq_export.model.introspect import inspect_model

RULE = CacheRule(2, 8, 4)
TILED = CacheRule(2, 8, 8)  # of artifacts whose codes are ordered by head
MAX_LENGTH = 150


@dataclass(frozen=True)
class TinyArtifact:
    path: Path
    model: torch.nn.Module
    codebooks: list[LayerCodebooks]
    rule: CacheRule
    exact_prefill: bool
    exact_dtype: torch.dtype
    codes_by_head: bool = False


def export(
    model: torch.nn.Module,
    path: Path,
    rule: CacheRule,
    exact_prefill: bool = False,
    exact_dtype: torch.dtype = torch.float16,
    max_length: int = MAX_LENGTH,
    codes_by_head: bool = False,
) -> TinyArtifact:
    """Any model with random codebooks: keys over all heads at once, values a head each."""
    spec = inspect_model(model, max_length)
    codebooks = []
    for layer in spec.layers:
        total = layer.num_kv_heads * layer.head_dim
        codebooks.append(
            LayerCodebooks(random_codebook(total, total, 3), random_codebook(total, layer.head_dim, 2, seed=1))
        )
    settings = ExportSettings(rule, exact_prefill=exact_prefill, exact_dtype=exact_dtype, codes_by_head=codes_by_head)
    export_onnx(model, spec, codebooks, settings, path)
    return TinyArtifact(path, model, codebooks, rule, exact_prefill, exact_dtype, codes_by_head)


def tiny_artifact(
    family: str = "Llama",
    exact_prefill: bool = False,
    exact_dtype: torch.dtype = torch.float32,
    codes_by_head: bool = False,
) -> TinyArtifact:
    """With float32 buffers two frameworks agree to 1e-5; float16 ones turn their last bits into 1e-3."""
    return _made(family, exact_prefill, exact_dtype, codes_by_head)  # all arguments spelled out: the cache's key


@lru_cache
def _made(family: str, exact_prefill: bool, exact_dtype: torch.dtype, codes_by_head: bool) -> TinyArtifact:
    directory = Path(tempfile.mkdtemp(prefix="gsrq-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    rule = TILED if codes_by_head else RULE
    model = tiny_model(family, num_hidden_layers=2)
    return export(model, directory, rule, exact_prefill, exact_dtype, codes_by_head=codes_by_head)

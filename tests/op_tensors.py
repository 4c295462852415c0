"""The operator's inputs by name and in order, and how a host's results are held to the reference."""

from __future__ import annotations

import torch
from attention_cases import Data

from gsrq_export.cache.reference import LayerCache
from gsrq_export.codec.codebook import Codebook

FEEDS = ["query", "key", "value", "cos", "sin", "past_lengths", "new_lengths"]
CACHE = ["key_codes", "value_codes", "key_exact", "value_exact"]
BOOKS = ["key_codebooks", "value_codebooks", "key_transform", "value_transform"]
CENTER = "key_center"  # of the rotated frame alone


def book_tensors(keys: Codebook, values: Codebook) -> dict[str, torch.Tensor]:
    books = dict(zip(BOOKS, (keys.codewords, values.codewords, keys.transform, values.transform), strict=True))
    return books if keys.center is None else {**books, CENTER: keys.center}


def feeds(data: Data, start: int, stop: int, io: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """FEEDS of a case's tokens start .. stop - 1, those before them in the cache."""
    past = data.lengths.clamp(max=start)
    tokens = [x[:, :, start:stop].to(io).contiguous() for x in (data.query, data.key, data.value)]
    values = (*tokens, data.cos, data.sin, past, (data.lengths.clamp(max=stop) - start).clamp(min=0))
    return dict(zip(FEEDS, values, strict=True))


def assert_close(output: torch.Tensor, expected: torch.Tensor, limit: float = 1e-3) -> None:
    """Row by row: a decode multiplies queries and keys as float16 (tests/gpu/test_cuda_kernels.py)."""
    for row, (got, right) in enumerate(zip(output, expected, strict=True)):
        assert float((got - right).norm()) <= limit * float(right.norm()), f"row {row}"


def assert_same(got: LayerCache, expected: LayerCache) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(got, name), tensor), name

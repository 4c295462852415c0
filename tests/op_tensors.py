"""Names and constants of the operator's inputs, in order, for hosts that take tensors by name."""

from __future__ import annotations

import torch

from gsrq_export.codec.codebook import Codebook

FEEDS = ["query", "key", "value", "cos", "sin", "past_lengths", "new_lengths"]
CACHE = ["key_codes", "value_codes", "key_exact", "value_exact"]
BOOKS = ["key_codebooks", "value_codebooks", "key_transform", "value_transform"]
CENTER = "key_center"  # of the rotated frame alone


def book_tensors(keys: Codebook, values: Codebook) -> dict[str, torch.Tensor]:
    books = dict(zip(BOOKS, (keys.codewords, values.codewords, keys.transform, values.transform), strict=True))
    return books if keys.center is None else {**books, CENTER: keys.center}

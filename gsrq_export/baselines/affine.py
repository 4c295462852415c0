"""Asymmetric min-max quantization with a 16-bit scale and zero point, the building block of KIVI and int4."""

from __future__ import annotations

import torch

OVERHEAD = 32  # bits a group: scale and zero point in float16


def affine(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Quantize and restore along ``dim``: s = (max - min) / (2^bits - 1), z = min, both rounded to float16 as stored;
    code = round((x - z) / s), held to 0 .. 2^bits - 1. A group without spread is its z."""
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / levels).half().float()
    zero = low.half().float()
    code = torch.where(scale > 0, (x - zero) / torch.where(scale > 0, scale, 1), 0).round().clamp(0, levels)
    restored: torch.Tensor = code * scale + zero
    return restored

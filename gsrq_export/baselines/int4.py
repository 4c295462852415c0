"""Integer quantization with one scale and zero point for each token and head, the int4 cache of serving engines.

Keys are coded after RoPE, as a paged cache holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrq_export.baselines.affine import OVERHEAD, affine
from gsrq_export.baselines.base import CacheCodec, Frame, Method, Sample
from gsrq_export.errors import GsrqError


class TokenHeadCodec(CacheCodec):
    """Min-max over the elements of a head."""

    frame: Frame = "post-rope"

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        return affine(vectors, self.bits, -1)

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.bits + OVERHEAD / head_dim


@dataclass(frozen=True)
class TokenHeadInt(Method):
    """Asymmetric integers of ``bits`` bits a token and head; float16 scale and zero point."""

    bits: int = 4
    frame = "post-rope"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise GsrqError(f"bits: {self.bits} is outside 1 .. 8", "4 is the usual choice")

    @property
    def label(self) -> str:
        return f"int{self.bits} per token and head"

    def fit(self, sample: Sample) -> CacheCodec:
        return TokenHeadCodec(self.bits)

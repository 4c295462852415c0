"""KIVI: "A Tuning-Free Asymmetric 2bit Quantization for KV Cache", Z. Liu et al., ICML 2024, arXiv 2402.02750.

Keys have outlier channels, so each channel has its own scale and zero point over a group of consecutive tokens;
values have theirs for a token over a group of channels. The newest tokens stay exact ("residual"): here the cache
rule's window. Keys are quantized after RoPE, as the authors' code does, in blocks that leave the window together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrq_export.baselines.affine import OVERHEAD, affine
from gsrq_export.baselines.base import CacheCodec, Frame, Method, Sample, check_divides
from gsrq_export.errors import GsrqError


class KiviKeys(CacheCodec):
    """Per channel, over groups of tokens."""

    frame: Frame = "post-rope"

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group_tokens = bits, group

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        check_divides(self.group_tokens, len(vectors), "KIVI group", "tokens coded at once")
        groups = vectors.reshape(-1, self.group_tokens, *vectors.shape[1:])
        return affine(groups, self.bits, 1).reshape(vectors.shape)

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.bits + OVERHEAD / self.group_tokens


class KiviValues(CacheCodec):
    """Per token, over groups of channels."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        groups = vectors.reshape(*vectors.shape[:2], -1, self.group)
        return affine(groups, self.bits, -1).reshape(vectors.shape)

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.bits + OVERHEAD / self.group


@dataclass(frozen=True)
class Kivi(Method):
    """``group`` tokens (keys) and channels (values) share a scale; the authors use 2 bits and groups of 32."""

    bits: int = 2
    group: int = 32
    frame = "post-rope"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.group < 1:
            raise GsrqError(
                f"KIVI: bits {self.bits} must be in 1 .. 8, group {self.group} at least 1", "the paper's are 2 and 32"
            )

    @property
    def label(self) -> str:
        return f"KIVI {self.bits} bit, groups of {self.group}"

    def check_heads(self, num_kv_heads: int, head_dim: int) -> None:
        check_divides(self.group, head_dim, "KIVI group", "elements of a head")

    def fit(self, sample: Sample) -> CacheCodec:
        if sample.kind == "key":
            return KiviKeys(self.bits, self.group)
        self.check_heads(sample.num_kv_heads, sample.head_dim)
        return KiviValues(self.bits, self.group)

"""CQ, coupled quantization: "KV Cache is 1 Bit Per Channel", T. Zhang et al., NeurIPS 2024, arXiv 2405.03917.

``channels`` neighbouring channels of a head share one code of 8 bits: 8 channels make 1 bit an element ("8c8b"), 4 make
2 bits, 16 half a bit. Each group has its own 256 centroids for keys (before RoPE) and for values, by k-means in which a
vector weighs its squared gradient norm (the diagonal Fisher information) where gradients are given. Seeds are data
points drawn uniformly, and k-means takes at most ``rows`` vectors, evenly spread: twice the paper's 16 sequences of
2048. That is residual quantization with a single stage and narrow sub-vectors, so its codec is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrq_export.baselines.base import CacheCodec, Method, Sample, check_divides
from gsrq_export.baselines.kmeans import grouped_kmeans
from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.codebook import Codebook
from gsrq_export.errors import GsrqError


def fisher_weights(norms: torch.Tensor) -> torch.Tensor:
    """Squared gradient norms, mean 1 in each group: float32 [N, groups]. All ones where every gradient is zero."""
    energy = norms.double() ** 2
    mean = energy.mean(0)
    return torch.where(mean > 0, energy / torch.where(mean > 0, mean, 1), 1).float()


@dataclass(frozen=True)
class CoupledQuantization(Method):
    """Codes of 8 bits for ``channels`` channels each."""

    channels: int = 8
    iterations: int = 100
    rows: int = 65_536

    def __post_init__(self) -> None:
        if min(self.channels, self.iterations, self.rows) < 1:
            raise GsrqError(
                f"CQ: channels {self.channels}, iterations {self.iterations} and rows {self.rows} must be at least 1",
                "the paper's are 8 (1 bit) or 4 (2 bits), 100 and 32768",
            )

    @property
    def label(self) -> str:
        return f"CQ-{self.channels}c8b"

    @property
    def gradient_width(self) -> int:
        return self.channels

    def check_heads(self, num_kv_heads: int, head_dim: int) -> None:
        check_divides(self.channels, head_dim, "CQ channels", "elements of a head")

    def fit(self, sample: Sample) -> CacheCodec:
        self.check_heads(sample.num_kv_heads, sample.head_dim)
        norms = sample.gradient_norms(self.channels)
        some = slice(None, None, -(-len(sample.vectors) // self.rows))
        x = sample.vectors[some].float().flatten(1)
        if len(x) < CODEBOOK_SIZE:
            raise GsrqError(f"{len(x)} calibration vectors for {CODEBOOK_SIZE} centroids", "calibrate on more text")
        groups = x.reshape(len(x), -1, self.channels).transpose(0, 1).contiguous()
        weights = torch.ones_like(groups[..., 0]) if norms is None else fisher_weights(norms[some]).T.contiguous()
        generator = torch.Generator().manual_seed(sample.seed)
        words = grouped_kmeans(groups, weights, self.iterations, generator)
        identity = torch.eye(self.channels, device=x.device).expand(len(words), -1, -1).contiguous()
        return ResidualCodec(Codebook(words.half()[:, None], identity))

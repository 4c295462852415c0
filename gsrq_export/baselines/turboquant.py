"""TurboQuant: "Online Vector Quantization with Near-optimal Distortion Rate", A. Zandieh et al., arXiv 2504.19874.

The variant for squared error (the paper's first algorithm): a head's vector is divided by its norm, turned by a random
orthogonal matrix, after which each coordinate times sqrt(head_dim) is nearly N(0, 1), and each is coded by the
Lloyd-Max scalar quantizer of that law. The norm is stored in float16. No data is needed. Keys are coded after RoPE.
The paper's second algorithm, which spends one of the bits on a sign sketch of the residual, is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from gsrq_export.baselines.base import CacheCodec, Frame, Method, Sample
from gsrq_export.errors import GsrqError


@cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels of N(0, 1), ascending (Max 1960): each is the mean of its cell, cells end halfway between."""
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        updated = -density.diff() / torch.special.ndtr(edges).diff()
        if float((updated - levels).abs().max()) < 1e-12:
            break
        levels = updated
    return tuple(updated.tolist())


@cache
def rotation(dim: int, seed: int, device: str) -> torch.Tensor:
    """A random orthogonal matrix float32 [dim, dim]; the same object for all layers, so it is counted once."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    uniform: torch.Tensor = q * r.diagonal().sign()  # the sign makes it uniform over rotations
    return uniform.float().to(device)


class TurboQuantCodec(CacheCodec):
    """Rotation, scalar codes and a norm for each token and head."""

    frame: Frame = "post-rope"

    def __init__(self, bits: int, turn: torch.Tensor) -> None:
        self.bits, self.turn = bits, turn

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(gaussian_levels(self.bits), device=vectors.device)
        root = math.sqrt(vectors.shape[-1])
        norm = vectors.norm(dim=-1, keepdim=True)
        turned = vectors / torch.where(norm > 0, norm, 1) @ self.turn.T * root
        code = torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)
        restored: torch.Tensor = (levels[code] / root) @ self.turn * norm.half().float()
        return restored

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.bits + 16 / head_dim

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.turn,)


@dataclass(frozen=True)
class TurboQuant(Method):
    """``bits`` a coordinate, and a float16 norm a token and head."""

    bits: int = 2
    frame = "post-rope"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise GsrqError(f"TurboQuant bits: {self.bits} is outside 1 .. 8", "the paper uses 2 to 4")

    @property
    def label(self) -> str:
        return f"TurboQuant {self.bits} bit"

    def fit(self, sample: Sample) -> CacheCodec:
        return TurboQuantCodec(self.bits, rotation(sample.head_dim, sample.seed, str(sample.vectors.device)))

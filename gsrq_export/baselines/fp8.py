"""FP8 cache of serving engines (vLLM, TensorRT-LLM): E4M3 of the OCP 8-bit format, arXiv 2209.05433.

One static scale for a layer's keys and one for its values ("per tensor"), the largest magnitude seen in calibration
over 448; what exceeds it saturates. Keys are coded after RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrq_export.baselines.base import CacheCodec, Frame, Method, Sample

LARGEST = 448.0  # finite value of E4M3


class Fp8Codec(CacheCodec):
    """Attributes: scale: float32 [1]."""

    frame: Frame = "post-rope"

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        # The cast alone gives NaN beyond the range; engines saturate.
        byte = (vectors / self.scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return byte.float() * self.scale

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return 8.0

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.scale,)


@dataclass(frozen=True)
class Fp8(Method):
    """E4M3 with a calibrated scale a layer and kind."""

    frame = "post-rope"

    @property
    def label(self) -> str:
        return "FP8 e4m3"

    def fit(self, sample: Sample) -> CacheCodec:
        largest = sample.vectors.abs().amax().float().reshape(1)
        return Fp8Codec(torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest)))

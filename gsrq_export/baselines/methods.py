"""The comparison's rows: every method at its rates, the published settings first."""

from __future__ import annotations

from gsrq_export.baselines.base import Method
from gsrq_export.baselines.cq import CoupledQuantization
from gsrq_export.baselines.fp8 import Fp8
from gsrq_export.baselines.int4 import TokenHeadInt
from gsrq_export.baselines.kivi import Kivi
from gsrq_export.baselines.residual import Residual
from gsrq_export.baselines.turboquant import TurboQuant
from gsrq_export.baselines.vqllm import Vqllm
from gsrq_export.codec.cluster import Method as Clustering

RATES = ((128, 16), (128, 32), (128, 8), (256, 12), (128, 12), (128, 20), (128, 64))  # (width, stages)


def methods() -> list[Method]:
    """Cheap rows first, then those that need codebooks, 1 bit before the other rates."""
    clusterings: tuple[Clustering, ...] = ("gskm", "kmeans")
    return [
        Fp8(),
        TokenHeadInt(4),
        Kivi(2, 32),
        Kivi(1, 32),
        Kivi(2, 64),
        Kivi(1, 64),
        TurboQuant(4),
        TurboQuant(2),
        TurboQuant(1),
        *(Residual(clustering, 128, 16) for clustering in clusterings),
        CoupledQuantization(8),
        CoupledQuantization(4),
        Vqllm(2048, 8),
        Vqllm(256, 8),
        Vqllm(256, 4),
        Vqllm(256, 2),
        *(Residual(clustering, width, stages) for width, stages in RATES[1:] for clustering in clusterings),
    ]

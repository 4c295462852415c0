"""The comparison's rows by stable id, from 8 bits an element down to 0.375."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

from gsrq_export.baselines.base import Method
from gsrq_export.baselines.cq import CoupledQuantization
from gsrq_export.baselines.fp8 import Fp8
from gsrq_export.baselines.int4 import TokenHeadInt
from gsrq_export.baselines.kivi import Kivi
from gsrq_export.baselines.residual import Residual
from gsrq_export.baselines.turboquant import TurboQuant
from gsrq_export.baselines.vqllm import Vqllm
from gsrq_export.codec.cluster import Method as Clustering
from gsrq_export.errors import GsrqError

RESIDUAL: dict[str, Clustering] = {"kmeans-rq": "kmeans", "gsrq": "gskm"}
# (width, stages): 2, 1.25, 1, 0.75, 0.5 and 0.375 bits. Published for GSRQ: 128x32, 128x16, 128x12 and 256x12.
RATES = ((128, 32), (128, 20), (128, 16), (128, 12), (128, 8), (128, 6), (256, 32), (256, 16), (256, 12))


def registry(iterations: int | None = None) -> dict[str, Method]:
    """Every method with its settings, those that need no training first.

    Args:
        iterations: of every clustering, for short runs; None: each method's own (GSRQ and k-means RQ 40, CQ 100).
    """
    methods: dict[str, Method] = {
        "fp8": Fp8(),
        "int4": TokenHeadInt(4),
        "kivi-2": Kivi(2, 32),
        "kivi-2-g64": Kivi(2, 64),
        "kivi-1": Kivi(1, 32),
        "kivi-1-g64": Kivi(1, 64),
        "turboquant-4": TurboQuant(4),
        "turboquant-2": TurboQuant(2),
        "turboquant-1": TurboQuant(1),
        "cq-2c8b": CoupledQuantization(2),
        "cq-4c8b": CoupledQuantization(4),
        "cq-8c8b": CoupledQuantization(8),
        "cq-16c8b": CoupledQuantization(16),
        "vqllm-2048x8": Vqllm(2048, 8),
        **{f"vqllm-256x{stages}": Vqllm(256, stages) for stages in (8, 5, 4, 3, 2)},
    }
    for name, clustering in RESIDUAL.items():
        methods |= {f"{name}-{width}x{stages}": Residual(clustering, width, stages) for width, stages in RATES}
    if iterations is None:
        return methods
    return {
        id: replace(method, iterations=iterations) if isinstance(method, (Residual, CoupledQuantization)) else method
        for id, method in methods.items()
    }


def chosen(ids: Sequence[str], iterations: int | None = None) -> dict[str, Method]:
    """The methods of these ids, in the registry's order; "all" is all of them.

    Raises:
        GsrqError: an id that there is not, with the nearest one.
    """
    known = registry(iterations)
    for id in ids:
        if id != "all" and id not in known:
            near = difflib.get_close_matches(id, known, 1, 0)
            raise GsrqError(
                f"method {id!r} is unknown", f"did you mean {near[0]}? All of them: {', '.join(known)}, or all"
            )
    return {id: method for id, method in known.items() if "all" in ids or id in ids}

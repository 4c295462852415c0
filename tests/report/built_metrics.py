"""Metrics of a build that never ran, for pages whose numbers are known."""

from __future__ import annotations

import math
from typing import Any

from gsrq_export.codec.profile import PositionError, Profile
from gsrq_export.evaluate.recall import DEPTHS, LengthRecall, Rate, RecallMetrics
from gsrq_export.evaluate.stats import wilson
from gsrq_export.evaluate.suite import Evaluation, PerplexityMetrics, compare
from gsrq_export.report.schema import BuildMetrics, CacheSize, Distortion, Kind, LayerProfile, RatePoint, RecallPoint

NASTY = '<script>alert("1")</script>&\'"'
SIDES: tuple[tuple[Kind, int], ...] = (("key", 7), ("value", 3))  # stages


def rate(correct: int, cases: int) -> Rate:
    if not cases:
        return Rate(rate=None, correct=0, cases=0, interval=None)
    return Rate(rate=correct / cases, correct=correct, cases=cases, interval=list(wilson(correct, cases)))


def evaluation(perplexity: float, hits: dict[int, int]) -> Evaluation:
    lengths = [
        LengthRecall(
            tokens=t,
            hits=[i < k for i in range(12)],
            by_depth=dict(zip(DEPTHS, [rate(k, 12), rate(0, 0), rate(0, 0)], strict=True)),
            **rate(k, 12),
        )
        for t, k in hits.items()
    ]
    scored = PerplexityMetrics(
        perplexity=perplexity,
        interval=[perplexity * 0.9, perplexity * 1.1],
        nll=math.log(perplexity),
        window_nll=[math.log(perplexity)] * 7,
        windows=7,
        window_tokens=256,
        prompt_tokens=1,
        scored_tokens=7 * 255,
    )
    return Evaluation(perplexity=scored, recall=RecallMetrics(facts=4, lengths=lengths), seed=0)


def profile(stages: int, last: float) -> Profile:
    return Profile(
        vectors=640,
        beam=2,
        by_stage=[last ** ((r + 1) / stages) for r in range(stages)],
        metric_by_stage=[last ** ((r + 1) / stages) / 2 for r in range(stages)],
        by_head=[last * 1.5, last * 0.5],
        by_position=[PositionError(0, 16, 40, last / 2), PositionError(16, 32, 40, last)],
        used_by_stage=[1 - 0.03 * r for r in range(stages)],
        entropy_by_stage=[7.5 - 0.1 * r for r in range(stages)],
        top_share_by_stage=[0.02 + 0.01 * r for r in range(stages)],
    )


def profiles(layers: int) -> list[LayerProfile]:
    return [
        LayerProfile(layer, kind, profile(stages, 0.04 * (layer + 1) / layers + 0.01 * stages))
        for layer in range(layers)
        for kind, stages in SIDES
    ]


def rates(label: str = "KIVI, b=2") -> list[RatePoint]:
    def recall(hits: int) -> list[RecallPoint]:
        return [RecallPoint(2048, hits / 48, *wilson(hits, 48))]

    def bits(nominal: float) -> dict[str, float]:
        return {"2048": 9.0, "131072": 1.25, "8192x64": 1.2 * nominal}

    return [
        RatePoint("GSRQ R16", True, 0.5, bits(0.5), "coded", {"novels": 1.04}, recall(30), 0.05, {"multi-key": 0.5}),
        RatePoint("GSRQ R32", True, 1.0, bits(1.0), "coded", {"novels": 1.01}, recall(47), 0.01, {"multi-key": 0.9}),
        RatePoint(label, False, 2.5, bits(2.5), "coded", {"novels": 1.10}, recall(24), None, None),
        RatePoint(
            "FP8", False, 8.0, {"2048": 8.0, "8192x64": 8.2}, "coded", {"novels": 0.9999, "wiki": 1.002}, [], 1e-7, None
        ),
    ]


def metrics(layers: int = 5) -> BuildMetrics:
    exact, coded = evaluation(21.5, {512: 12, 2048: 11}), evaluation(22.25, {512: 11, 2048: 9})
    sizes = [
        CacheSize(n, 32 * n, 135_168, 3 << 20, 3072 * n, 16 * (32 * n + 135_168 + (3 << 20)) / (3072 * n))
        for n in (300, 2048)
    ]
    distortion = [
        Distortion(layer, kind, [0.6**r for r in range(1, stages + 1)], [1 - 0.03 * r for r in range(stages)])
        for layer in range(layers)
        for kind, stages in SIDES
    ]
    return BuildMetrics(
        "demo", 1.0, 1.4, 0.6, sizes, distortion, exact, coded, compare(exact, coded), profiles(layers), rates()
    )


def long_metrics(base: BuildMetrics) -> dict[str, Any]:
    """The parts that an evaluation with tasks and fidelity adds, as changes to ``base``."""

    def score(value: float) -> list[dict[str, Any]]:
        return [
            {"task": "multi-key", "tokens": 1024, "score": value, "interval": [value - 0.1, value + 0.1], "cases": 24}
        ]

    change = {"task": "multi-key", "tokens": 1024, "exact": 0.75, "coded": 0.625, "difference": -0.125}
    fidelity = {
        "prompts": 8,
        "top1_agreement": {"mean": 0.937, "interval": [0.91, 0.96], "per_prompt": []},
        "kl": {"mean": 0.0123, "interval": [0.01, 0.0156], "per_prompt": []},
    }
    comparison = {**(base.comparison or {}), "fidelity": fidelity, "tasks": [{**change, "interval": [-0.25, 0.0]}]}
    exact, coded = base.exact or {}, base.coded or {}
    return {
        "exact": {**exact, "tasks": score(0.75)},
        "coded": {**coded, "tasks": score(0.625)},
        "comparison": comparison,
    }

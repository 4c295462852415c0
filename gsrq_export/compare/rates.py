"""A comparison's rows as the points of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gsrq_export.compare.schema import Comparison, Row
from gsrq_export.evaluate.stats import wilson
from gsrq_export.report.schema import RatePoint, RecallPoint


def rate_points(comparison: Comparison) -> list[RatePoint]:
    """Every row beside the unquantized model of its prefill mode; recall, tasks and KL are those of the first text."""
    return [_point(row, comparison.unquantized[row.prefill]) for row in comparison.rows]


def _point(row: Row, exact: Mapping[str, Mapping[str, Any]]) -> RatePoint:
    first: Mapping[str, Any] = next(iter(row.metrics.values()))
    recall = []
    for entry in (first.get("recall") or {}).get("lengths", []):
        low, high = wilson(entry["correct"], entry["cases"])
        recall.append(RecallPoint(entry["tokens"], entry["rate"], low, high))
    tasks = {f"{entry['task']}@{entry['tokens']}": entry["score"] for entry in first.get("tasks") or []}
    divergence = (first.get("fidelity") or {}).get("kl")
    return RatePoint(
        label=row.label,
        ours=row.ours,
        nominal_bits=row.nominal_bits,
        effective_bits=dict(row.effective_bits),
        prefill=row.prefill,
        perplexity_ratio={
            name: found["perplexity"]["perplexity"] / exact[name]["perplexity"]["perplexity"]
            for name, found in row.metrics.items()
        },
        recall=recall,
        kl=divergence["mean"] if divergence else None,
        tasks=tasks or None,
    )

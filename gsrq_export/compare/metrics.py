"""The figures of an evaluation that rows are compared by, with what they are a mean of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gsrq_export.compare.schema import Metrics

Better = Literal["lower", "higher"]
# Of generations against the unquantized model's, where an evaluation has them; the unquantized one has none.
FIDELITY: dict[str, Better] = {"top1_agreement": "higher", "kl": "lower", "agreed_tokens": "higher"}


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: "perplexity novels", "recall@2048 novels".
        value: unrounded.
        better: which way.
        units: what it is a mean of, in an order that all rows share: nats a token of each window, hits or scores of
            each case. Perplexity is the exponential of that mean.
        interval: 95 %, where the evaluation gave one.
    """

    name: str
    value: float
    better: Better
    units: Sequence[float]
    interval: tuple[float, float] | None = None

    def at_least_as_good(self, other: Metric) -> bool:
        """By the values as they are, nothing rounded."""
        return self.value <= other.value if self.better == "lower" else self.value >= other.value

    @property
    def is_rate(self) -> bool:
        """Units are hits, each right or wrong."""
        return self.better == "higher" and all(unit in (0.0, 1.0) for unit in self.units)


def metrics_of(metrics: Metrics) -> list[Metric]:
    """Every figure of a row, text by text."""
    return [metric for name, evaluation in metrics.items() for metric in _of_text(name, evaluation)]


def _of_text(text: str, evaluation: Mapping[str, Any]) -> list[Metric]:
    perplexity = evaluation["perplexity"]
    interval = _interval(perplexity.get("interval"))
    found = [
        Metric(f"perplexity {text}", perplexity["perplexity"], "lower", perplexity["window_nll"], interval),
    ]
    for row in (evaluation.get("recall") or {}).get("lengths", []):
        hits = [float(hit) for hit in row["hits"]]
        name = f"recall@{row['tokens']} {text}"
        found.append(Metric(name, sum(hits) / len(hits), "higher", hits, _interval(row.get("interval"))))
    for row in evaluation.get("tasks") or []:
        name = f"{row['task']}@{row['tokens']} {text}"
        found.append(Metric(name, row["score"], "higher", row["case_scores"], _interval(row.get("interval"))))
    fidelity = evaluation.get("fidelity") or {}
    for name, better in FIDELITY.items():
        if row := fidelity.get(name):
            found.append(Metric(f"{name} {text}", row["mean"], better, row["per_prompt"], _interval(row["interval"])))
    return found


def _interval(given: Sequence[float] | None) -> tuple[float, float] | None:
    return (given[0], given[1]) if given else None

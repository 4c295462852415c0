"""Are our rows at least as good as the rivals'? Decided on unrounded figures; the statistics only say how sure it is.

A row of ours holds in a metric if no rival of the same prefill mode with as many effective bits or more is better.
Rivals with fewer bits that are better are named too: they make our row pointless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gsrq_export.compare.metrics import Metric, metrics_of
from gsrq_export.compare.schema import Comparison, Row, ServingPoint
from gsrq_export.errors import GsrqError
from gsrq_export.gate.bounds import loss_bounds, mean_bounds

POINT = ServingPoint(tokens=8192, sequences=64)
ONE_SIDED = 0.975  # each bound; together a 95 % interval

Statement = Literal["better", "not distinguishable", "worse"]


@dataclass(frozen=True)
class Against:
    """Our figure beside a rival's.

    Attributes:
        statement: of the paired difference, with 95 % confidence.
        bounds: of it, ours - rival in nats a token, or in hits or score a case; None where one unit shows no spread.
    """

    rival: Row
    ours: float
    theirs: float
    at_least_as_good: bool
    statement: Statement
    bounds: tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """One row of ours in one metric.

    Attributes:
        dearer: against rivals with as many effective bits or more.
        cheaper: against those with fewer.
    """

    row: Row
    metric: Metric
    dearer: list[Against]
    cheaper: list[Against]

    @property
    def holds(self) -> bool:
        return all(other.at_least_as_good for other in self.dearer)

    @property
    def lost_to(self) -> list[Against]:
        """Rivals with as many bits or more that are better."""
        return [other for other in self.dearer if not other.at_least_as_good]

    @property
    def undercut_by(self) -> list[Against]:
        """Rivals with fewer bits that are better."""
        return [other for other in self.cheaper if not other.at_least_as_good]


def verdicts(comparison: Comparison, point: ServingPoint = POINT) -> list[Verdict]:
    """Every row of ours in every metric, in the file's order.

    Raises:
        GsrqError: bits were not counted at the serving point.
    """
    require_point(comparison, point)
    found = []
    for row in (row for row in comparison.rows if row.ours):
        rivals = [other for other in comparison.rows if not other.ours and other.prefill == row.prefill]
        bits = row.effective_bits[point.key]
        for metric in metrics_of(row.metrics):
            dearer: list[Against] = []
            cheaper: list[Against] = []
            for rival in rivals:
                against = _against(metric, rival)
                (dearer if rival.effective_bits[point.key] >= bits else cheaper).append(against)
            found.append(Verdict(row, metric, dearer, cheaper))
    return found


def require_point(comparison: Comparison, point: ServingPoint) -> None:
    """Raises GsrqError where effective bits were not counted at the serving point."""
    keys = [known.key for known in comparison.protocol.serving]
    if point.key not in keys:
        raise GsrqError(f"serving point {point.key} was not counted", f"choose one of {', '.join(keys)}")


def _against(ours: Metric, rival: Row) -> Against:
    theirs = next((metric for metric in metrics_of(rival.metrics) if metric.name == ours.name), None)
    if theirs is None:
        raise GsrqError(f"row {rival.id} has no {ours.name}", "measure all rows again under one protocol")
    bounds = difference_bounds(ours, theirs)
    statement: Statement = "not distinguishable"
    if bounds is not None and (bounds[0] > 0 or bounds[1] < 0):
        statement = "better" if (bounds[0] > 0) == (ours.better == "higher") else "worse"
    return Against(rival, ours.value, theirs.value, ours.at_least_as_good(theirs), statement, bounds)


def difference_bounds(ours: Metric, theirs: Metric) -> tuple[float, float] | None:
    """The 95 % interval of the mean difference of paired units, ours - theirs.

    Student's t over windows and scores, Tango's interval for hits; None for a single window, which has no spread.

    Raises:
        GsrqError: the two were not measured on the same units.
    """
    if ours.name != theirs.name or len(ours.units) != len(theirs.units):
        raise GsrqError(
            f"{ours.name} has {len(ours.units)} units, {theirs.name} of the rival {len(theirs.units)}",
            "measure all rows again under one protocol",
        )
    difference = np.asarray(ours.units, np.float64) - np.asarray(theirs.units, np.float64)
    if ours.is_rate and theirs.is_rate:
        lost, gained = int((difference < 0).sum()), int((difference > 0).sum())
        low, high = loss_bounds(lost, gained, len(difference), ONE_SIDED)
        return -high, -low
    if len(difference) < 2:
        return None
    return mean_bounds(difference.tolist(), ONE_SIDED)

"""Verdicts, and the report that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """The value is the exit status. 2 is left to bad usage, as in every command."""

    ACCEPT = 0
    REGRESSION = 1
    ANOMALOUS = 3
    INCOMPLETE = 4


# An implausible measurement puts every other gate in doubt; a shown regression is not excused by a gate that could
# not tell.
_RANK = (Verdict.ANOMALOUS, Verdict.REGRESSION, Verdict.INCOMPLETE, Verdict.ACCEPT)


@dataclass(frozen=True)
class GateResult:
    """One gate.

    Attributes:
        name: stable, for CI: ``perplexity-recovery``, ``recall-recovery-512``.
        detail: one sentence that says what was found.
        figures: unrounded numbers behind it, by name.
        unit: of value, lower, upper and limit in ``figures``: "perplexity" (relative), "recall", "bytes", "".
    """

    name: str
    verdict: Verdict
    detail: str
    figures: dict[str, float] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class GateReport:
    """All gates of one check.

    Attributes:
        properties: what was compared with what: names, hashes, backend, settings, environment.
    """

    artifact: str
    results: Sequence[GateResult]
    seconds: float
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The gravest of the gates' verdicts; a report without gates is incomplete."""
        found = {result.verdict for result in self.results}
        return next((verdict for verdict in _RANK if verdict in found), Verdict.INCOMPLETE)


def show(value: float, unit: str) -> str:
    """A figure to read; the exact one is in ``figures``."""
    if unit == "perplexity":
        return f"{100 * value:+.3f} %"
    if unit == "recall":
        return f"{value:+.4f}"
    return f"{value:,.0f}" if unit == "bytes" else f"{value:.3g}"

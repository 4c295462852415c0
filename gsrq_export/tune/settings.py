"""How much a search does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Attributes:
    rows: training vectors of a ladder's codebook at most; the recipe's own training uses all.
    iterations: of its clustering.
    rungs: numbers of stages measured of each ladder.
    sensed: held-out sequences on which the ladders are measured.
    compared: other held-out sequences on which whole budgets are.
    """

    rows: int
    iterations: int
    rungs: int
    sensed: int
    compared: int


EFFORTS = {"quick": Effort(8192, 3, 4, 2, 3), "full": Effort(65536, 10, 7, 8, 16)}
HEADROOM = 3  # a place may get this many times the stages of the uniform budget
WINDOWS = (0.25, 0.5, 2.0)  # times the recipe's, tried in the place of it
SINKS = (0.0, 2.0)  # likewise
CURVE = (0.5, 1.0, 1.5)  # times the stages of the uniform budget: the points of the rate-quality curve

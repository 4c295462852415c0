"""Ladders: the loss of one place at some numbers of stages, from one codebook.

Stages are trained one after the other, each on what those before left, so the first R of a codebook are the codebook
that training R stages would have given (before any refit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

TINY = 1e-9  # nats; what is below is not told apart


def rungs(highest: int, count: int) -> list[int]:
    """At most ``count`` numbers of stages from 1 to ``highest``, in equal ratios."""
    if highest == 1:
        return [1]
    return sorted({round(highest ** (i / (count - 1))) for i in range(count)})


def interpolated(losses: Mapping[int, float]) -> list[float]:
    """Losses at 1, 2, ... stages: between rungs a power of the stages, and never rising (rises are noise)."""
    known = sorted(losses)
    falling, least = {}, math.inf
    for stages in known:
        least = min(least, max(TINY, losses[stages]))
        falling[stages] = least
    found = []
    for stages in range(1, known[-1] + 1):
        below = max(k for k in known if k <= stages)
        if below == stages:
            found.append(falling[stages])
            continue
        above = min(k for k in known if k > stages)
        share = math.log(stages / below) / math.log(above / below)
        found.append(math.exp((1 - share) * math.log(falling[below]) + share * math.log(falling[above])))
    return found

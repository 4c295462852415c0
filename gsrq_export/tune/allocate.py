"""Which option each place gets so that the losses add up to the least within the bytes there are.

A multiple-choice knapsack, by dynamic programming over the Pareto front of (bytes, loss): exact as long as the front
has at most FRONT points; beyond that the best of each of FRONT ranges of bytes are kept, still with their true bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FRONT = 8192


@dataclass(frozen=True)
class Option:
    """One width and number of stages of a place: what it takes and what it costs the model."""

    width: int
    stages: int
    bytes: int
    loss: float


def allocate(places: Sequence[Sequence[Option]], limit: int) -> list[Option] | None:
    """One option a place, least total loss with at most ``limit`` bytes in total; None where none fits."""
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    # What the places still to come take at least: states that leave less are dead.
    rest = [*np.cumsum([min(option.bytes for option in place) for place in reversed(places)])[::-1].tolist(), 0]
    for i, place in enumerate(places):
        total = (sizes[:, None] + np.array([option.bytes for option in place])).ravel()
        loss = (losses[:, None] + np.array([option.loss for option in place])).ravel()
        keep = np.flatnonzero(total <= limit - rest[i + 1])
        if not len(keep):
            return None
        keep = keep[np.lexsort((loss[keep], total[keep]))]
        best = np.minimum.accumulate(loss[keep])
        keep = keep[np.concatenate([[True], loss[keep][1:] < best[:-1]])]
        if len(keep) > FRONT:
            low, high = total[keep[0]], total[keep[-1]]
            range_of = (total[keep] - low) * FRONT // (high - low + 1)
            keep = keep[np.append(range_of[1:] != range_of[:-1], True)]  # losses fall, so a range's last is its best
        back.append((keep // len(place), keep % len(place)))
        sizes, losses = total[keep], loss[keep]
    state = len(losses) - 1  # the front's last has the least loss
    chosen = []
    for place, (parents, options) in zip(reversed(places), reversed(back), strict=True):
        chosen.append(place[int(options[state])])
        state = int(parents[state])
    return chosen[::-1]

"""Confidence intervals."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); sound for few trials and rates of 0 or 1.

    Raises:
        ValueError: successes outside 0 .. trials, or no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    rate, z2 = successes / trials, Z95 * Z95
    centre = rate + z2 / (2 * trials)
    half = Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    # Rounding may leave the ends a hair outside where the rate is 0 or 1.
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap_mean(values: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean over independent units.

    Args:
        values: [N], one a unit (a window of text, say); N = 1 gives a point.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)

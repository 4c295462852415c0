"""One-sided confidence bounds and tests on paired measurements: the same windows, the same cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

_STEPS = 200  # of bisection: the interval is a float's spacing long before


def t_cdf(t: float, degrees: int) -> float:
    """Student's t distribution for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4).

    Raises:
        ValueError: degrees below 1.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom")
    angle = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range((degrees - 1) // 2 if odd else degrees // 2):
        total += term
        k = 2 * i + (2 if odd else 1)
        term *= cos2 * k / (k + 1)
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + within / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which a share ``probability`` lies; 0 < probability < 1."""
    if not 0 < probability < 1:
        raise ValueError(f"probability {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    return _bisect(low, high, lambda t: t_cdf(t, degrees) < probability)


def mean_bounds(differences: Sequence[float], confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bounds of a mean, each of this confidence (Student's t over units).

    Args:
        differences: one a unit, at least two; units are independent, as windows that do not overlap are.
    Raises:
        ValueError: fewer than two.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        raise ValueError(f"{len(values)} differences have no spread")
    mean = float(values.mean())
    half = t_quantile(confidence, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def loss_bounds(lost: int, gained: int, pairs: int, confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bounds of (lost - gained) / pairs, the drop of a rate between paired runs.

    The score interval of Tango (Statistics in Medicine 17:891, 1998). Unlike a bootstrap it stays open where
    no pair differs: 0 lost of n leaves an upper bound of z^2 / (n + z^2).

    Args:
        lost: pairs that hit in the first run only.
        gained: pairs that hit in the second run only.
    Raises:
        ValueError: counts that do not fit.
    """
    if lost < 0 or gained < 0 or pairs < 1 or lost + gained > pairs:
        raise ValueError(f"{lost} lost and {gained} gained of {pairs} pairs")
    z = NormalDist().inv_cdf(confidence)
    return -_upper_loss(gained, lost, pairs, z), _upper_loss(lost, gained, pairs, z)


def _upper_loss(lost: int, gained: int, n: int, z: float) -> float:
    def allowed(loss: float) -> bool:
        # The share of gains that is most likely if the loss were this: the root of the restricted likelihood.
        b = (2 * n + gained - lost) * loss - lost - gained
        c = -gained * loss * (1 - loss)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * max(0.0, 2 * share + loss * (1 - loss))
        return lost - gained - n * loss >= -z * math.sqrt(variance)

    return _bisect((lost - gained) / n, 1.0, allowed)


def sign_test(lost: int, gained: int) -> float:
    """Exact one-sided p-value of losses being no likelier than gains (McNemar).

    P(Binomial(lost + gained, 1/2) >= lost); 1 where nothing changed.
    """
    changed = lost + gained
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / (1 << changed)


def cases_needed(limit: float, confidence: float) -> int:
    """The fewest pairs with which a run that loses nothing is shown to lose at most ``limit``."""
    z2 = NormalDist().inv_cdf(confidence) ** 2
    return math.ceil(z2 * (1 - limit) / limit - 1e-9)


def _bisect(low: float, high: float, below: Callable[[float], bool]) -> float:
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) else (low, middle)
    return high

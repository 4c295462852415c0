"""The statistics of the gates against integration, brute force, published values and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gsrq_export.gate.bounds import cases_needed, loss_bounds, mean_bounds, sign_test, t_cdf, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101])
def test_t_cdf_is_the_integral_of_its_density(degrees: int) -> None:
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    for t in (0.1, 0.9, 2.5, 12.0):
        x = np.linspace(0, t, 200_001)
        integral = np.trapezoid(constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2), x)
        assert t_cdf(t, degrees) == pytest.approx(0.5 + integral, abs=1e-9)
        assert t_cdf(-t, degrees) == pytest.approx(0.5 - integral, abs=1e-9)


def test_t_quantiles_of_the_tables() -> None:
    for probability, degrees, value in ((0.95, 7, 1.895), (0.975, 1, 12.706), (0.95, 30, 1.697), (0.999, 4, 7.173)):
        assert t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)
        assert t_quantile(1 - probability, degrees) == pytest.approx(-value, abs=6e-4)
    with pytest.raises(ValueError, match="probability 1"):
        t_quantile(1.0, 5)
    with pytest.raises(ValueError, match="0 degrees"):
        t_cdf(1.0, 0)


def test_mean_bounds_cover_and_miss_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    bounds = [mean_bounds(rng.normal(0.3, 2.0, 9).tolist(), 0.9) for _ in range(2000)]
    below = sum(lower > 0.3 for lower, _ in bounds)
    above = sum(upper < 0.3 for _, upper in bounds)
    for missed in (below, above):
        assert 160 <= missed <= 240, "each of the two misses one time in ten"
    assert mean_bounds([0.25] * 5, 0.95) == (0.25, 0.25)
    with pytest.raises(ValueError, match="1 differences have no spread"):
        mean_bounds([1.0], 0.95)


def brute_upper(lost: int, gained: int, n: int, z: float) -> float:
    """The largest loss on a grid that the score test does not reject, its nuisance share by a grid too."""
    found = -1.0
    share = np.linspace(1e-7, 1, 20_001)
    for loss in np.linspace((lost - gained) / n, 0.999, 400):
        rest = 1 - 2 * share - loss
        ok = (rest > 1e-12) & (share + loss > 1e-12)
        q = share[ok]
        if not len(q):
            continue
        likelihood = gained * np.log(q) + lost * np.log(q + loss) + (n - lost - gained) * np.log(rest[ok])
        best = float(q[likelihood.argmax()])
        if lost - gained - n * loss >= -z * math.sqrt(n * (2 * best + loss - loss * loss)):
            found = max(found, float(loss))
    return found


@pytest.mark.parametrize(("lost", "gained", "n"), [(7, 1, 21), (0, 0, 24), (3, 0, 50), (2, 9, 40), (5, 5, 31)])
def test_loss_bounds_against_brute_force(lost: int, gained: int, n: int) -> None:
    lower, upper = loss_bounds(lost, gained, n, 0.95)
    assert lower <= (lost - gained) / n <= upper
    assert upper == pytest.approx(brute_upper(lost, gained, n, 1.644854), abs=0.004)
    assert -lower == pytest.approx(brute_upper(gained, lost, n, 1.644854), abs=0.004)


def test_loss_bounds_at_known_points() -> None:
    # Fagerland, Lydersen and Laake (2014), airway hyper-responsiveness: Tango's 95 % interval is 0.026 .. 0.517.
    assert loss_bounds(7, 1, 21, 0.975) == pytest.approx((0.026, 0.517), abs=5e-4)
    z2 = 1.6448536**2
    assert loss_bounds(0, 0, 24, 0.95)[1] == pytest.approx(z2 / (24 + z2), abs=1e-7)
    assert loss_bounds(9, 0, 9, 0.95)[1] == 1.0
    for limit in (0.02, 0.05, 0.3):
        need = cases_needed(limit, 0.95)
        assert loss_bounds(0, 0, need, 0.95)[1] <= limit < loss_bounds(0, 0, need - 1, 0.95)[1]
    with pytest.raises(ValueError, match="3 lost and 2 gained of 4 pairs"):
        loss_bounds(3, 2, 4, 0.95)


def test_loss_bounds_cover() -> None:
    rng = np.random.default_rng(1)
    draws = rng.multinomial(60, [0.15, 0.05, 0.8], 1500)
    missed = sum(loss_bounds(int(b), int(c), 60, 0.95)[1] < 0.10 for b, c, _ in draws)
    assert 30 <= missed <= 120, "about one in twenty"


def test_sign_test_by_counting() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 1 / 32
    for lost, gained in ((3, 1), (1, 3), (6, 2)):
        flips = np.arange(2 ** (lost + gained))
        ones = np.array([bin(f).count("1") for f in flips])
        assert sign_test(lost, gained) == pytest.approx(float((ones >= lost).mean()))

"""The allocation is the best there is, within the bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gsrq_export.tune import allocate as module
from gsrq_export.tune.allocate import Option, allocate


def random_places(rng: np.random.Generator, places: int, options: int) -> list[list[Option]]:
    return [
        [
            Option(64, stages, int(rng.integers(1, 50)), float(rng.exponential() / stages))
            for stages in range(1, options + 1)
        ]
        for _ in range(places)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_as_good_as_trying_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = random_places(rng, 5, 4)
    limit = int(rng.integers(20, 200))
    fitting = [c for c in itertools.product(*places) if sum(option.bytes for option in c) <= limit]
    found = allocate(places, limit)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert all(option in place for option, place in zip(found, places, strict=True))
    assert sum(option.bytes for option in found) <= limit
    best = min(sum(option.loss for option in c) for c in fitting)
    assert sum(option.loss for option in found) == pytest.approx(best, rel=1e-12)


def test_a_thinned_front_stays_within_the_bytes_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    places = random_places(np.random.default_rng(0), 12, 8)
    exact = allocate(places, 220)
    monkeypatch.setattr(module, "FRONT", 40)
    thinned = allocate(places, 220)
    assert exact is not None
    assert thinned is not None
    assert sum(option.bytes for option in thinned) <= 220
    best = sum(option.loss for option in exact)
    assert best <= sum(option.loss for option in thinned) <= 1.2 * best


def test_the_exact_limit_is_reached_and_one_byte_less_is_not() -> None:
    places = [[Option(64, 1, 10, 1.0), Option(64, 2, 20, 0.1)], [Option(64, 1, 7, 1.0), Option(64, 2, 14, 0.5)]]
    for limit, stages in ((34, (2, 2)), (33, (2, 1)), (26, (1, 2)), (17, (1, 1))):
        found = allocate(places, limit)
        assert found is not None
        assert tuple(option.stages for option in found) == stages
    assert allocate(places, 16) is None

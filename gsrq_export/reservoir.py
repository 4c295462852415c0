"""Which calibration tokens are kept where memory is budgeted: a uniform sample of fixed size, as a reservoir's is.

Every token draws a priority from the seed and the smallest are kept. So the sample depends on the seed and on the
number of tokens alone, not on shards, their order, or who captures them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.int64]]


def kept_tokens(tokens: int, budget: int | None, seed: int) -> Rows | None:
    """int64 [budget], rising, of 0 .. tokens - 1; None where all are kept."""
    if budget is None or budget >= tokens:
        return None
    priority = np.random.default_rng([seed, 2]).integers(0, 2**63, tokens)
    return np.sort(np.argsort(priority, kind="stable")[:budget])


def rows_of(kept: Rows | None, start: int, stop: int) -> Rows | None:
    """Those of the kept tokens that are tokens start .. stop - 1, counted from ``start``."""
    if kept is None:
        return None
    first, last = np.searchsorted(kept, [start, stop])
    return kept[first:last] - start

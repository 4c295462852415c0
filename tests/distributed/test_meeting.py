"""How processes meet over a store, also one in which those of an earlier attempt have left what they said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from gsrq_export.distributed import group
from gsrq_export.distributed.group import attempt
from gsrq_export.errors import GsrqError


def test_each_attempt_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store, names = HashStore(), set()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            met = set(pool.map(lambda rank: attempt(store, rank, 4), range(4)))
            assert len(met) == 1
            names |= met
        assert len(names) == 3
        monkeypatch.setattr(group, "MEETING", timedelta(seconds=0.2))
        alone = pool.submit(attempt, store, 2, 4)  # it is not answered by what was said before
        with pytest.raises(GsrqError, match="rank 2: rank 0 did not answer"):
            alone.result()
        with pytest.raises(GsrqError, match=r"ranks \[1, 2, 3\] did not come"):
            attempt(store, 0, 4)

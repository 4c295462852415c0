"""Sums and picks over parts are the same to the bit, however the parts are spread."""

from __future__ import annotations

import threading

import pytest
import torch

from gsrq_export.build.codebooks import PARTS, spread_rows
from gsrq_export.codec.residual import Training, train_codebook, train_parts
from gsrq_export.codec.rows import Rows
from gsrq_export.distributed.world import World
from gsrq_export.errors import GsrqError


class Threads:
    """As many ranks as threads."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, {}
        self.barrier = threading.Barrier(size, timeout=60)

    def run(self, work: object) -> list[object]:
        found: dict[int, object] = {}

        def one(rank: int) -> None:
            try:
                found[rank] = work(rank, lambda tensor: self.gather(rank, tensor))  # type: ignore[operator]
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.size)]

    def gather(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.given[rank] = tensor
        self.barrier.wait()
        whole = torch.stack([self.given[r] for r in range(self.size)])
        self.barrier.wait()
        return whole


def bounds(count: int, parts: int = PARTS) -> tuple[int, ...]:
    blocks = count // 16
    return (*(p * blocks // parts * 16 for p in range(parts)), count)


def held(x: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    return [x[rows.bounds[p] : rows.bounds[p + 1]].clone() for p in rows.here]


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8, 31, 32])
def test_totals_and_picks(size: int) -> None:
    x = torch.randn(1003, 7, generator=torch.Generator().manual_seed(size)) * 10 ** torch.linspace(-3, 3, 1003)[:, None]
    index = torch.randperm(1003, generator=torch.Generator().manual_seed(1))[:99]

    def work(rank: int, gather: object, of: int = size) -> tuple[torch.Tensor, torch.Tensor]:
        rows = Rows(bounds(1003), rank, of, gather)  # type: ignore[arg-type]
        mine = held(x, rows)
        return rows.total(lambda i: mine[i].sum(0)), rows.take(mine, index)

    total, taken = work(0, None, 1)
    torch.testing.assert_close(total.double(), x.double().sum(0), rtol=1e-4, atol=1e-1)
    assert torch.equal(taken, x[index])
    for other_total, other_taken in Threads(size).run(work):  # type: ignore[misc]
        assert torch.equal(total, other_total)
        assert torch.equal(taken, other_taken)


@pytest.mark.parametrize("method", ["gskm", "kmeans", "kmeans-spherical"])
def test_training(method: str) -> None:
    """Clusters run empty here, so rows are reseeded too; 3 processes hold parts that end inside subtrees."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(700, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    x[::3] = x[0]
    weights = torch.rand(700, 2, generator=generator)
    training = Training(method, 2, beam=2, refits=int(method == "gskm"))  # type: ignore[arg-type]

    def work(rank: int, gather: object, of: int = 3) -> tuple[torch.Tensor, list[float]]:
        rows = Rows(bounds(700), rank, of, gather)  # type: ignore[arg-type]
        book, log = train_parts(held(x, rows), held(weights, rows), 6, 2, training, rows)
        return book.codewords, log.held_out

    words, log = work(0, None, 1)
    for other_words, other_log in Threads(3).run(work):  # type: ignore[misc]
        assert torch.equal(words, other_words)
        assert log == other_log
    _, whole = train_codebook(x, weights, 6, 2, training)
    assert log[-1] == pytest.approx(whole.held_out[-1], rel=0.15)


def test_what_cannot_be_spread() -> None:
    world = World()
    assert spread_rows(512, world).bounds == tuple(range(0, 513, 16))
    with pytest.raises(GsrqError, match="511 calibration tokens, at least 512 are needed"):
        spread_rows(511, world)
    world.size = 33
    with pytest.raises(GsrqError, match="33 processes, at most 32"):
        spread_rows(10_000, world)
    with pytest.raises(ValueError, match="3 parts cannot be spread"):
        Rows((0, 1, 2, 3))

"""Calibration rows in fixed parts, so that many processes can each hold some of them and all get the same sums.

A sum over rows is one partial sum a part, added up along a binary tree over the parts. The tree is the same however
the parts are spread, so the result is the same to the bit on one process and on many; a process adds up the subtrees
that it holds whole and hands over those sums only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Gather = Callable[[torch.Tensor], torch.Tensor]
Node = tuple[int, int]  # a subtree: parts from .. up to


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]


@dataclass(frozen=True)
class Rows:
    """Where rows lie.

    Attributes:
        bounds: the first row of each part, and the number of rows; a power of two of parts.
        rank, size: of this process, which holds parts ``rank * parts // size`` up to those of the next one.
        gather: a tensor of every process, [...], to all of them, [size, ...].
    """

    bounds: tuple[int, ...]
    rank: int = 0
    size: int = 1
    gather: Gather = _itself

    def __post_init__(self) -> None:
        parts = len(self.bounds) - 1
        if parts < 1 or parts & (parts - 1) or not 0 <= self.rank < self.size <= parts:
            raise ValueError(f"{parts} parts cannot be spread over {self.size} processes")

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @property
    def parts(self) -> int:
        return len(self.bounds) - 1

    @property
    def here(self) -> range:
        """The parts of this process."""
        return self._held(self.rank)

    def _held(self, rank: int) -> range:
        return range(rank * self.parts // self.size, (rank + 1) * self.parts // self.size)

    def without(self, every: int) -> Rows:
        """Of the same rows without the last of each ``every``; the bounds must be multiples of it, but the last."""
        return Rows(tuple(b - b // every for b in self.bounds), self.rank, self.size, self.gather)

    def total(self, partial: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The sum over all parts.

        Args:
            partial: the sum over the rows of a part, by its place among those here.
        """
        first = self.here.start

        def fold(node: Node) -> torch.Tensor:
            start, stop = node
            if stop - start == 1:
                return partial(start - first)
            middle = (start + stop) // 2
            return fold((start, middle)) + fold((middle, stop))

        mine = [fold(node) for node in self._subtrees[self.rank]]
        if self.size == 1:
            return mine[0]
        most = max(map(len, self._subtrees))
        mine += [torch.zeros_like(mine[0])] * (most - len(mine))
        every = self.gather(torch.stack(mine))
        known = {
            node: every[rank, place] for rank, nodes in enumerate(self._subtrees) for place, node in enumerate(nodes)
        }

        def join(node: Node) -> torch.Tensor:
            if node in known:
                return known[node]
            middle = (node[0] + node[1]) // 2
            return join((node[0], middle)) + join((middle, node[1]))

        return join((0, self.parts))

    @cached_property
    def _subtrees(self) -> list[list[Node]]:
        """The largest whole subtrees of each process, in order."""

        def within(node: Node, held: range) -> list[Node]:
            start, stop = node
            if held.start <= start and stop <= held.stop:
                return [node]
            if stop <= held.start or held.stop <= start:
                return []
            middle = (start + stop) // 2
            return within((start, middle), held) + within((middle, stop), held)

        return [within((0, self.parts), self._held(rank)) for rank in range(self.size)]

    def take(self, parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        """Rows by their places among all.

        Args:
            parts: [n, ...], the parts here.
            index: int64 [M], the same on every process.
        Returns:
            [M, ...].
        """
        if self.parts == 1:
            return parts[0][index.to(parts[0].device)]
        found = parts[0].new_zeros((len(index), *parts[0].shape[1:]))
        owner = torch.bucketize(index, torch.tensor(self.bounds[1:-1], device=index.device), right=True)
        for place, part in zip(self.here, parts, strict=True):
            which = torch.nonzero(owner == place).flatten()
            found[which.to(found.device)] = part[(index[which] - self.bounds[place]).to(part.device)]
        if self.size == 1:
            return found
        holder = torch.tensor([rank for rank in range(self.size) for _ in self._held(rank)], device=index.device)
        return self.gather(found)[holder[owner].to(found.device), torch.arange(len(index), device=found.device)]


def whole(count: int) -> Rows:
    """All rows as one part of one process."""
    return Rows((0, count))

"""The processes of a build as its stages see them. Here: one process alone; distributed/group.py has many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gsrq_export.stages.progress import Task


class World:
    """One process, rank 0 of 1. All methods but ``share`` are called by every process, in the same order.

    Attributes:
        rank: of this process; rank 0 holds the work directory and runs what is not distributed.
        size: processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> range:
        """Which of ``count`` equal jobs are this process's."""
        return range(self.rank, count, self.size)

    def claim(self, count: int) -> Iterator[int]:
        """Jobs of different sizes: each process is given the next one whenever it asks."""
        yield from range(count)

    def tell(self, value: Any) -> Any:
        """What rank 0 gave, plain data."""
        return value

    def barrier(self) -> None:
        """Wait until every process is here; as long as it takes, since one that dies stops all."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        yield

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] of every process, all of one shape, to [size, ...]."""
        return tensor[None]

    def progress(self, task: Task) -> Callable[[int], None]:
        """Advances a task by what all processes do."""
        return task.advance

    def agree(self, facts: Mapping[str, object]) -> None:
        """Check that every process has the same facts, plain data.

        Raises:
            GsrqError: on a process that differs from rank 0, naming both.
        """


ALONE = World()

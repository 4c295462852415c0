"""Progress of long stages: bars on a terminal, plain lines elsewhere. Written to stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 5.0  # seconds between plain lines of one task


class Task(Protocol):
    """One bar."""

    def update(self, done: int, total: int | None = None) -> None:
        """Set what is done, and the total where it was not known."""

    def advance(self, count: int = 1) -> None: ...


class Reporter(Protocol):
    """Where stages report to."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]: ...

    def line(self, text: str) -> None: ...


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None = None) -> None:
        if total is None:
            self._progress.update(self._task, completed=done)
        else:
            self._progress.update(self._task, completed=done, total=total)

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)


class BarReporter:
    """rich bars; tasks may nest."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        outermost = self._live is None
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._live.start()
        progress = self._live
        task = progress.add_task(label, total=total)
        try:
            yield _Bar(progress, task)
        finally:
            if outermost:
                progress.stop()
                self._live = None
            else:
                progress.remove_task(task)

    def line(self, text: str) -> None:
        (self._live.console if self._live else self._console).print(text, highlight=False, markup=False)


class _Lines:
    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._console, self._label, self.total = console, label, total
        self.done = 0
        self._started = self._last = time.monotonic()

    def update(self, done: int, total: int | None = None) -> None:
        self.done = done
        self.total = total if total is not None else self.total
        if time.monotonic() - self._last >= LINE_EVERY:
            self.print()

    def advance(self, count: int = 1) -> None:
        self.update(self.done + count)

    def print(self) -> None:
        self._last = time.monotonic()
        of = f" of {self.total}" if self.total is not None else ""
        text = f"{self._label}: {self.done}{of}, {self._last - self._started:.0f} s"
        self._console.print(text, highlight=False, markup=False)


class LineReporter:
    """A line every few seconds and one at the end of each task, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        lines = _Lines(self._console, label, total)
        yield lines
        lines.print()

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


def quiet_reporter() -> Reporter:
    """Says nothing."""
    return LineReporter(Console(quiet=True))


def make_reporter(console: Console | None = None) -> Reporter:
    """Bars if the console is a terminal, else lines."""
    console = console or Console(stderr=True)
    return BarReporter(console) if console.is_terminal else LineReporter(console)

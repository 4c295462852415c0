"""Stages: each reads the finished directories of others and writes its own, once.

A stage's directory is ``<work>/<stage>-<first 12 hex digits of its key>``; while it is being written
it is that name plus ``.partial``, renamed when complete. Inside it, units (files such as a capture shard
or one layer's codebook) are written atomically, so a stage killed at any moment goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from filelock import FileLock, Timeout

from gsrq_export.distributed.world import ALONE, World
from gsrq_export.errors import GsrqError
from gsrq_export.stages.keys import stage_key
from gsrq_export.stages.progress import Reporter, make_reporter, quiet_reporter
from gsrq_export.stages.storage import (
    LEFTOVER,
    SHOWN,
    await_files,
    disk_errors,
    sync_directory,
    sync_tree,
    write_atomic,
)

STAMP = "stage.json"
PARTIAL = ".partial"

Status = Literal["done", "partial", "to do"]


@dataclass(frozen=True)
class Context:
    """What a running stage gets.

    Attributes:
        directory: where it writes; other names than its units' are free until it returns.
        inputs: the finished directories of the stages it needs, by name.
        reporter: for progress.
        world: the processes that run the stage; several only where the stage is distributed.
    """

    directory: Path
    inputs: Mapping[str, Path]
    reporter: Reporter
    world: World = ALONE

    def has(self, name: str) -> bool:
        """Whether a unit is there from an earlier, interrupted run."""
        return self._path(name).is_file()

    def unit(self, name: str, write: Callable[[Path], object]) -> Path:
        """The file ``name`` in the stage's directory, written by ``write(path)`` unless it is there.

        ``write`` gets a temporary path; the file appears under its name whole or not at all.
        """
        path = self._path(name)
        if not path.is_file():
            write_atomic(path, write)
        return path

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or parts.name.startswith(LEFTOVER) or name == STAMP:
            raise ValueError(f"{name!r} cannot name a unit")
        return self.directory / parts


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: lower-case letters, digits and '_'.
        material: plain data (JSON) of everything its result depends on: its recipe section, the hashes of the
            files it reads. Keys of needed stages, library versions and this package's code are added.
        run: writes the result into the context's directory; may be called again after an interruption.
        needs: names of the stages whose directories it reads.
        distributed: every process runs it; the others run on rank 0 alone.
    """

    name: str
    material: Mapping[str, Any]
    run: Callable[[Context], object]
    needs: tuple[str, ...] = ()
    distributed: bool = False


@dataclass(frozen=True)
class Planned:
    """A stage, its full key, its directory once finished, and how far it is."""

    name: str
    key: str
    directory: Path
    status: Status


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which each follows those it needs.

    In a build of many processes rank 0 holds the work directory, says what is run, and finishes each stage. The
    others take part in distributed stages and are done after the last of them that is to do.

    Raises (on construction):
        ValueError: two stages of one name, or one that needs a stage not before it.
    """

    work: Path
    stages: Sequence[Stage]
    reporter: Reporter = field(default_factory=make_reporter)
    world: World = ALONE

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen or not stage.name.replace("_", "").isalnum():
                raise ValueError(f"stage name {stage.name!r} is taken or not a plain name")
            if missing := set(stage.needs) - seen:
                raise ValueError(f"stage {stage.name} needs {sorted(missing)}, which no earlier stage makes")
            seen.add(stage.name)

    def plan(self) -> list[Planned]:
        """What a run would do; changes nothing, needs no lock."""
        keys: dict[str, str] = {}
        planned = []
        for stage in self.stages:
            key = stage_key(stage.name, stage.material, {name: keys[name] for name in stage.needs})
            keys[stage.name] = key
            directory = self.work / f"{stage.name}-{key[:12]}"
            status: Status = "to do"
            if _is_finished(directory, key):
                status = "done"
            elif _partial(directory).is_dir():
                status = "partial"
            planned.append(Planned(stage.name, key, directory, status))
        return planned

    def run(self) -> dict[str, Path]:
        """Run what is not done; returns every stage's directory, on other ranks than 0 nothing.

        Raises:
            GsrqError: the work directory is in use or cannot be written, or a stage's own error. What is done stays.
        """
        if self.world.rank:
            self._follow()
            return {}
        with disk_errors("work directory", self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        done: dict[str, Path] = {}
        with work_lock(self.work):
            plan = self.plan()
            last = max((i for i, s in enumerate(self.stages) if s.distributed and plan[i].status != "done"), default=-1)
            if last < 0:
                self.world.tell(None)  # there is nothing for the others to do
            for place, (stage, planned) in enumerate(zip(self.stages, plan, strict=True)):
                if planned.status == "done":
                    self.reporter.line(f"{stage.name}: done before, kept")
                else:
                    self._run_stage(stage, planned, {name: done[name] for name in stage.needs})
                done[stage.name] = planned.directory
                if place == last:
                    self.world.tell(None)
        return done

    def _run_stage(self, stage: Stage, planned: Planned, inputs: Mapping[str, Path]) -> None:
        partial = _partial(planned.directory)
        self.reporter.line(f"{stage.name}: {'going on' if planned.status == 'partial' else 'started'}")
        started = time.monotonic()
        with disk_errors(f"stage {stage.name}", self.work):
            if planned.directory.exists():  # its stamp or a file of it is gone
                shutil.rmtree(planned.directory)
            partial.mkdir(exist_ok=True)
            for leftover in partial.rglob(f"{LEFTOVER}*"):
                leftover.unlink()
            (partial / STAMP).unlink(missing_ok=True)
            world = self.world if stage.distributed else ALONE
            if world.size > 1:
                stamps = {name: [str(path), _key_of(path)] for name, path in inputs.items()}
                world.tell({"stage": stage.name, "directory": str(partial), "inputs": stamps})
            stage.run(Context(partial, inputs, self.reporter, world))
            stamp = {"stage": stage.name, "key": planned.key, "files": _sizes(partial)}
            write_atomic(partial / STAMP, lambda path: path.write_text(json.dumps(stamp, indent=1, sort_keys=True)))
            sync_tree(partial)
            partial.rename(planned.directory)
            sync_directory(self.work)
        self.reporter.line(f"{stage.name}: finished in {time.monotonic() - started:.1f} s")

    def _follow(self) -> None:
        """Take part in what rank 0 says."""
        stages = {stage.name: stage for stage in self.stages}
        while (order := self.world.tell(None)) is not None:
            partial = Path(order["directory"])
            await_files([partial])
            for path, key in order["inputs"].values():
                _await_finished(Path(path), key)
            inputs = {name: Path(path) for name, (path, _) in order["inputs"].items()}
            with disk_errors(f"stage {order['stage']}", self.work):
                stages[order["stage"]].run(Context(partial, inputs, quiet_reporter(), self.world))


@contextmanager
def work_lock(work: Path) -> Iterator[None]:
    """Hold a work directory; released by the system however the process ends.

    Raises:
        GsrqError: another process holds it; names it.
    """
    lock, holder = FileLock(work / ".lock"), work / ".holder.json"
    try:
        with disk_errors("work directory", work):
            lock.acquire(timeout=0)
    except Timeout:
        raise GsrqError(
            f"work directory {work} is in use by {_describe_holder(holder)}",
            "wait until that build has ended, or name another work directory",
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with disk_errors("work directory", work):
            who = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            write_atomic(holder, lambda path: path.write_text(who))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe_holder(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has the lock but has not written its name yet


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + PARTIAL)


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name != STAMP)
    return {f.relative_to(directory).as_posix(): f.stat().st_size for f in files}


def _key_of(directory: Path) -> str:
    return str(json.loads((directory / STAMP).read_text())["key"])


def _await_finished(directory: Path, key: str) -> None:
    """Wait until a stage's directory is seen whole, which another machine has finished."""
    deadline = time.monotonic() + SHOWN
    while not _is_finished(directory, key):
        if time.monotonic() > deadline:
            raise GsrqError(
                f"{directory} is finished, but is not seen whole on {socket.gethostname()}",
                "give a --work directory on a file system that all machines share",
            )
        time.sleep(0.1)


def _is_finished(directory: Path, key: str) -> bool:
    """Complete, of this very key, with all its files at their sizes."""
    try:
        stamp = json.loads((directory / STAMP).read_text())
        return bool(stamp["key"] == key and stamp["files"] == _sizes(directory))
    except (OSError, ValueError, KeyError, TypeError):
        return False

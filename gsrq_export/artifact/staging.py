"""Directories in which artifacts are put together, beside their destination; what a killed build left is removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if os.name == "posix":
    import fcntl


@contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """A fresh directory beside ``out``, removed at the end whatever happens to it.

    It is locked while in use. The system drops the lock however the process ends, so an unlocked one of the same
    destination belongs to nobody and is removed first. Where there are no locks (some network file systems), nothing
    is removed.
    """
    prefix = f".{out.name}.building-"
    for left in out.parent.glob(f"{_literal(prefix)}*"):
        _remove_if_abandoned(left)
    building, handle = _locked(prefix, out.parent)
    try:
        building.chmod(0o755)
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _literal(name: str) -> str:
    """For glob: brackets in an artifact's name stand for themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _locked(prefix: str, parent: Path) -> tuple[Path, int | None]:
    while True:
        building = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            handle = _lock(building)
        except BlockingIOError:
            continue  # another build took it for an abandoned one, and removes it
        if building.is_dir():
            return building, handle
        if handle is not None:  # removed before it was locked
            os.close(handle)


def _lock(directory: Path) -> int | None:
    """A handle that holds the directory's lock, or None where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    if os.name != "posix":
        return None
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_if_abandoned(directory: Path) -> None:
    try:
        handle = _lock(directory)
    except BlockingIOError:
        return
    if handle is not None:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(handle)

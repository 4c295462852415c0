"""Files that are there whole or not at all, and disk errors that say what to do."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gsrq_export.errors import GsrqError

TEMPORARY = ".tmp-"
LEFTOVER = ".tmp"  # how names of files begin that a killed process may leave: ours, and those that safetensors renames
SHOWN = 90.0  # seconds; directories are cached for 60 by default on NFS


def json_writer(data: object) -> Callable[[Path], object]:
    """Writes plain data, without NaN, to a path: for ``Context.unit``."""
    return lambda path: path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


_MENDS = {
    errno.ENOSPC: ("the disk is full", "free space or use a directory on another disk; what is done is kept"),
    errno.EDQUOT: ("the disk quota is used up", "free space or use another directory; what is done is kept"),
    errno.EFBIG: ("a file is larger than is allowed", "raise the limit (ulimit -f) or use another file system"),
    errno.EROFS: ("the file system is read-only", "use a directory that can be written"),
    errno.EACCES: ("no permission to write", "use a directory that you may write to"),
    errno.EPERM: ("no permission to write", "use a directory that you may write to"),
    errno.ENOTDIR: ("a file stands where a directory should", "name another directory"),
    errno.EEXIST: ("a file stands where a directory should", "name another directory"),
}


@contextmanager
def disk_errors(doing: str, directory: Path) -> Iterator[None]:
    """Turn a full or read-only disk under ``directory`` into a GsrqError; other errors pass.

    Libraries that write files wrap the system's error in their own types; those are known by their text.
    """
    try:
        yield
    except GsrqError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and not isinstance(error, OSError):
            code = next(
                (c for c in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) if os.strerror(c) in str(error)),
                None,
            )
        if code not in _MENDS:
            raise
        problem, mend = _MENDS[code]
        named = Path(os.fsdecode(error.filename)) if isinstance(error, OSError) and error.filename else directory
        if not named.is_absolute() or not named.is_relative_to(directory.absolute()):
            if code in (errno.EACCES, errno.EPERM):
                raise  # a file that we read, not one that we write
            named = directory
        raise GsrqError(f"{doing}: {problem}: {named}", mend) from error


def move_to_free_place(directory: Path, to: Path) -> bool:
    """Rename; False where something stands, maybe since this moment, by a process beside this one."""
    if to.exists():
        return False
    try:
        directory.rename(to)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then put it in place, synced.

    A writer that fails leaves nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write(temporary)
        sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def await_files(paths: Sequence[Path]) -> None:
    """Wait for files that other machines have written; a network file system shows them with some delay.

    Raises:
        GsrqError: one does not come.
    """
    deadline = time.monotonic() + SHOWN
    for path in paths:
        while not path.exists():
            if time.monotonic() > deadline:
                raise GsrqError(
                    f"{path} was written by another process, but is not seen on {socket.gethostname()}",
                    "give a --work directory on a file system that all machines share",
                )
            time.sleep(0.1)


def sync_file(path: Path) -> None:
    """fsync a file's content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut. No-op where directories cannot be opened."""
    if os.name != "nt":
        sync_file(path)


def sync_tree(root: Path) -> None:
    """fsync every file and directory below and including ``root``."""
    for directory, _, files in os.walk(root):
        for name in files:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))

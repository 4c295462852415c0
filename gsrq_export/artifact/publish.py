"""Putting a finished artifact into place: all of it or nothing, replacing an older one without a gap."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from pathlib import Path

from gsrq_export.artifact.manifest import MANIFEST, MAX_MANIFEST_BYTES
from gsrq_export.errors import ArtifactError
from gsrq_export.stages.storage import disk_errors, move_to_free_place, sync_directory, sync_tree

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_destination(out: Path) -> None:
    """Whether an artifact may be published here; to be called before the long work, too.

    Raises:
        ArtifactError: something stands there that is neither an empty directory nor an artifact.
    """
    if out.is_symlink():
        raise ArtifactError(f"{out} is a symbolic link", "name the directory itself")
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out} is a file", "name a directory that does not exist yet")
    if any(out.iterdir()) and not is_artifact(out):
        raise ArtifactError(
            f"{out} holds files and is not an artifact", "name a directory that does not exist yet, or empty it"
        )


def is_artifact(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours, of any version, sound or not."""
    path = directory / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
            return False
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and str(data.get("created_by", "")).startswith("gsrq-export") and "schema" in data


def publish(built: Path, out: Path) -> None:
    """Move a complete directory to its place; ``built`` is gone afterwards.

    An artifact that is there already is exchanged in one step where the system can (Linux), else moved
    aside first and put back if the new one cannot take its place; it is removed last.

    Args:
        built: a directory with a manifest, on the same file system as ``out``.
    Raises:
        ArtifactError: ``built`` has no manifest, or `check_destination` refuses ``out``.
        GsrqError: the disk is full or read-only; what was at ``out`` is still there.
    """
    if not is_artifact(built):
        raise ArtifactError(f"{built} has no {MANIFEST} yet", "write the manifest before publishing")
    check_destination(out)
    with disk_errors("publishing", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        if built.stat().st_dev != out.parent.stat().st_dev:
            raise ArtifactError(f"{built} and {out} are on different disks", "build beside the destination")
        sync_tree(built)
        if not move_to_free_place(built, out):
            if _exchange(built, out):
                shutil.rmtree(built, ignore_errors=True)  # a build beside this one may be removing it, too
            else:
                _swap(built, out)
        sync_directory(out.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _swap(built: Path, out: Path) -> None:
    """Two renames; the old artifact is back in place if the second fails."""
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(aside)
    try:
        built.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside)

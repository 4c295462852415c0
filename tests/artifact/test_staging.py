"""The directory in which an artifact is put together, and those that killed builds left."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gsrq_export.artifact.staging import staging_directory


def hold(out: Path, told: Connection) -> None:
    with staging_directory(out) as building:
        (building / "half.bin").write_bytes(b"x" * 100)
        told.send(building)
        signal.pause()


@pytest.mark.parametrize("name", ["artifact", "art[if]act*"])
def test_what_a_killed_build_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path, name: str) -> None:
    out, context = tmp_path / name, get_context("fork")
    processes, buildings = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(out, theirs))
        process.start()
        processes.append(process)
        buildings.append(ours.recv())
    assert all(building.is_dir() for building in buildings)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].join()
    assert buildings[0].is_dir()
    with staging_directory(out) as building:
        assert not buildings[0].exists()
        assert (buildings[1] / "half.bin").is_file()
        assert building.stat().st_mode & 0o777 == 0o755
    assert not building.exists()
    processes[1].kill()
    processes[1].join()


def test_published_and_failed_builds_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with staging_directory(out) as building:
        building.rename(out)
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    with pytest.raises(RuntimeError, match="stop"), staging_directory(out):
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]

"""Many processes calibrate as one does, to the bit; one that is killed stops all, and the next run goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.calibrations import HERE, environment, hashes, launch, prepare

from gsrq_export.distributed.lifeline import EXIT

SECONDS = 10  # from the first end of a process to the last; on a busy machine mostly under one
OTHERS = (2, 3)  # processes, where one is compared with many
KILLS = [  # what is shared, who dies, at which of what it does
    ("codebooks", 2, "write", 2),
    ("codebooks", 0, "write", 3),
    ("rows", 1, "gather", 40),
    ("rows", 3, "meet", 1),
]


def arguments(recipe: Path, work: Path, parallel: str, *more: object) -> list[str]:
    both = ["codebooks", "rows"] if parallel == "both" else [parallel]
    fixed = ["--stages", "--recipe", str(recipe), "--work", str(work), "--parallel", *both]
    return [*fixed, *map(str, more)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(recipe: Path, root: Path) -> list[dict[str, Any]]:
    """All runs of launch.py, as it takes longer to start than they do: 1 process, OTHERS, then KILLS, each mended by 2.

    Their work directories are those of ``work``.
    """
    calm = [(size, arguments(recipe, work(root, size), "both")) for size in (1, *OTHERS)]
    killed, mended = [], []
    for number, (parallel, rank, where, count) in enumerate(KILLS):
        given = arguments(recipe, work(root, f"killed-{number}"), parallel)
        killed.append((4, [*given, "--die", str(rank), where, str(count)]))
        mended.append((2, given))
    return launch(*calm, *killed, *mended)


def work(root: Path, name: object) -> Path:
    return root / f"{name}"


def test_worlds_of_other_sizes_give_the_same_bits(runs: list[dict[str, Any]], root: Path) -> None:
    alone = work(root, 1)
    for size, run in zip((1, *OTHERS), runs, strict=False):
        assert run["statuses"] == [0] * size, run["output"]
        assert hashes(work(root, size)) == hashes(alone)
    assert len(list(alone.glob("capture-*/shard-*"))) == 6
    codebooks = sorted(alone.glob("codebooks-*/codebooks.safetensors"))
    assert len(codebooks) == 2  # the two ways round differently, and are kept apart
    assert codebooks[0].read_bytes() != codebooks[1].read_bytes()
    logs = [json.loads(file.with_name("distortion.json").read_text()) for file in codebooks]
    for one, other in zip(*logs, strict=True):
        assert one["held_out"][-1] == pytest.approx(other["held_out"][-1], rel=0.1)


def test_four_processes_of_torchrun(recipe: Path, runs: list[dict[str, Any]], root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    command += [str(HERE / "worker.py"), *arguments(recipe, tmp_path / "work", "both")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "backend gloo" in done.stdout
    assert hashes(tmp_path / "work") == hashes(work(root, 1))


def test_a_killed_process_stops_all_and_the_next_run_goes_on(runs: list[dict[str, Any]], root: Path) -> None:
    """Without a launcher that cleans up: each process learns it over its lifeline."""
    first = 1 + len(OTHERS)
    alone = hashes(work(root, 1))
    for number, (_, rank, _, _) in enumerate(KILLS):
        run = runs[first + number]
        assert run["statuses"][rank] == -signal.SIGKILL, run
        assert all(status == EXIT for r, status in enumerate(run["statuses"]) if r != rank), run
        assert run["first_to_last"] < SECONDS
        assert re.search(rf"stops: rank {rank}( \(process \d+ on .*\))? ended without a word", run["output"]), run
        assert "start the same command again" in run["output"]
        mended = runs[first + len(KILLS) + number]
        assert mended["statuses"] == [0, 0], mended["output"]
        found = work(root, f"killed-{number}")
        assert hashes(found).items() < alone.items()  # all but the codebooks of the other way
        assert len(list(found.glob("codebooks-*/codebooks.safetensors"))) == 1

"""Many processes calibrate as one does, to the bit; one that is killed stops all, and the next run goes on."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from distributed.calibrations import hashes, launch, prepare, torchrun

from gsrq_export.distributed.lifeline import EXIT

SECONDS = 10  # from the first end of a process to the last; on a busy machine mostly under one
OTHERS = (4,)  # processes, where one is compared with many; tests of rows have odd numbers
KILLS = {  # what is shared: one after the other in one work directory, who dies, at which of what it does
    "codebooks": [(1, "write", 2), (2, "claim", 1), (0, "write", 3)],
    "rows": [(3, "meet", 1), (1, "gather", 40)],
}


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
def runs(recipe: Path, root: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs of launch.py, as it takes longer to start than they do.

    Calm ones; those that are killed, and after them one of two processes that goes on; those that are refused.
    """
    wanted: dict[str, list[tuple[int, list[str]]]] = {
        "calm": [(size, arguments(recipe, root / f"{size}", "both")) for size in (1, *OTHERS)]
    }
    for parallel, kills in KILLS.items():
        given = arguments(recipe, root / f"killed-{parallel}", parallel)
        wanted[parallel] = [(4, [*given, "--die", str(rank), where, str(n)]) for rank, where, n in kills]
        wanted[parallel].append((2, given))
    spoken = root / "spoken"
    spoken.mkdir()
    told = prepare(spoken, {"sources": [{"kind": "stdin"}]})
    wanted["refused"] = [
        (2, arguments(recipe, root / "threads", "codebooks", "--threads", 1, 2)),
        (2, ["gsrq", "build", "--recipe", str(told), "--out", str(spoken / "out")]),
    ]
    # Both take most of their time to start, on one core each.
    beside = torchrun(2, arguments(recipe, root / "torchrun", "both"))
    try:
        found = iter(launch(*(run for some in wanted.values() for run in some)))
        (root / "torchrun.log").write_text(beside.communicate(timeout=120)[0])
    finally:
        beside.kill()
    return {name: [next(found) for _ in some] for name, some in wanted.items()}


def test_worlds_of_other_sizes_give_the_same_bits(runs: dict[str, list[dict[str, Any]]], root: Path) -> None:
    alone = root / "1"
    for size, run in zip((1, *OTHERS), runs["calm"], strict=True):
        assert run["statuses"] == [0] * size, run["output"]
        assert hashes(root / f"{size}") == hashes(alone)
    assert len(list(alone.glob("capture-*/shard-*"))) == 6
    codebooks = sorted(alone.glob("codebooks-*/codebooks.safetensors"))
    assert len(codebooks) == 2  # the two ways round differently, and are kept apart
    assert codebooks[0].read_bytes() != codebooks[1].read_bytes()
    logs = [json.loads(file.with_name("distortion.json").read_text()) for file in codebooks]
    for one, other in zip(*logs, strict=True):
        assert one["held_out"][-1] == pytest.approx(other["held_out"][-1], rel=0.1)


def test_processes_of_torchrun(runs: dict[str, list[dict[str, Any]]], root: Path) -> None:
    assert runs["calm"][0]["statuses"] == [0]
    log = (root / "torchrun.log").read_text()
    assert "backend gloo" in log, log
    assert hashes(root / "torchrun") == hashes(root / "1"), log


@pytest.mark.parametrize("parallel", list(KILLS))
def test_a_killed_process_stops_all_and_the_next_run_goes_on(
    parallel: str, runs: dict[str, list[dict[str, Any]]], root: Path
) -> None:
    """Without a launcher that cleans up: each process learns it over its lifeline."""
    *killed, mended = runs[parallel]
    for (rank, _, _), run in zip(KILLS[parallel], killed, strict=True):
        assert run["statuses"][rank] == -signal.SIGKILL, run
        assert all(status == EXIT for r, status in enumerate(run["statuses"]) if r != rank), run
        assert run["first_to_last"] < SECONDS
        assert re.search(rf"stops: rank {rank}( \(process \d+ on .*\))? ended without a word", run["output"]), run
        assert "start the same command again" in run["output"]
    assert mended["statuses"] == [0, 0], mended["output"]
    found = root / f"killed-{parallel}"
    assert hashes(found).items() < hashes(root / "1").items()  # all but the codebooks of the other way
    assert len(list(found.glob("codebooks-*/codebooks.safetensors"))) == 1


def test_what_differs_or_cannot_be_is_refused_by_name(runs: dict[str, list[dict[str, Any]]], root: Path) -> None:
    threads, spoken = runs["refused"]
    assert threads["statuses"] == [EXIT, 2], threads
    assert re.search(
        r"number of threads \(OMP_NUM_THREADS\) of rank 1 on \S+ is 2, of rank 0 on \S+ 1", threads["output"]
    )
    assert not (root / "threads").exists()
    assert all(spoken["statuses"]), spoken
    assert "kind stdin cannot be read by many processes" in spoken["output"]
    assert not (root / "spoken/out").exists()

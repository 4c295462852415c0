"""Stages run once, go on after a kill -9 to the same bytes, and rerun exactly what a change touches."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console
from small_pipeline import BLOCKS, pipeline, tree

from gsrq_export.errors import GsrqError
from gsrq_export.stages.engine import Context, Pipeline, Stage
from gsrq_export.stages.progress import make_reporter
from gsrq_export.stages.storage import disk_errors, write_atomic

fork = multiprocessing.get_context("fork")


def run(work: Path, pause: float) -> None:
    pipeline(work, seed=1, pause=pause).run()


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "calm", 0)
    rng, killed = random.Random(0), 0
    work = tmp_path / "rough"
    for _ in range(40):
        process = fork.Process(target=run, args=(work, 0.02))
        process.start()
        process.join(rng.uniform(0.02, 0.25))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            # What stands under its final name is whole, at every moment.
            for name, content in tree(work).items():
                if ".partial/" not in name or name.endswith(".z"):
                    final = name.replace(".partial/", "/")
                    assert ".tmp-" in name or content == tree(tmp_path / "calm")[final]
        else:
            assert process.exitcode == 0
            break
    assert killed >= 3
    run(work, 0)
    assert tree(work) == tree(tmp_path / "calm")


def test_units_done_before_an_interruption_are_not_done_again(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Log(list[str]):
        def append(self, what: str) -> None:
            super().append(what)
            if what == "block 5":
                raise Stop

    first: list[str] = Log()
    with pytest.raises(Stop):
        pipeline(tmp_path, seed=1, log=first).run()
    assert [p.status for p in pipeline(tmp_path, seed=1).plan()] == ["done", "partial", "to do"]
    assert not list(tmp_path.rglob(".tmp*"))
    (interrupted,) = tmp_path.glob("*.partial")
    for name in (".tmp-block", ".tmpNQkjO1"):  # as processes leave them that are killed; the latter is safetensors' way
        (interrupted / name).write_text("half")
    second: list[str] = []
    pipeline(tmp_path, seed=1, log=second).run()
    assert second == [f"block {i}" for i in range(5, BLOCKS)] + ["index"]
    assert not list(tmp_path.rglob(".tmp*"))
    third: list[str] = []
    pipeline(tmp_path, seed=1, log=third).run()
    assert third == []


def test_a_change_reruns_what_depends_on_it(tmp_path: Path) -> None:
    pipeline(tmp_path, seed=1).run()
    log: list[str] = []
    assert [p.status for p in pipeline(tmp_path, seed=1, level=9).plan()] == ["done", "to do", "to do"]
    pipeline(tmp_path, seed=1, level=9, log=log).run()
    assert log == [f"block {i}" for i in range(BLOCKS)] + ["index"]
    assert [p.status for p in pipeline(tmp_path, seed=2).plan()] == ["to do"] * 3
    # The old results are still there: going back costs nothing.
    assert [p.status for p in pipeline(tmp_path, seed=1).plan()] == ["done"] * 3


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    done = pipeline(tmp_path, seed=1).run()
    before = tree(tmp_path)
    (done["compress"] / "blocks" / "03.z").unlink()
    with (done["text"] / "text.bin").open("ab") as file:
        file.write(b"x")
    assert [p.status for p in pipeline(tmp_path, seed=1).plan()] == ["to do", "to do", "done"]
    pipeline(tmp_path, seed=1).run()
    assert tree(tmp_path) == before


def test_the_plan_of_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    planned = pipeline(tmp_path / "work", seed=1).plan()
    assert [p.name for p in planned] == ["text", "compress", "index"]
    assert planned[0].directory.name == f"text-{planned[0].key[:12]}"
    assert not (tmp_path / "work").exists()


def test_code_and_versions_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gsrq_export.stages import keys

    before = pipeline(tmp_path, seed=1).plan()[0].key
    monkeypatch.setattr(keys, "environment", lambda: {**keys_environment, "torch": "0"})
    keys_environment = {"torch": "1"}
    assert pipeline(tmp_path, seed=1).plan()[0].key != before
    with pytest.raises(GsrqError, match="stage x: its key material is not plain data"):
        Pipeline(tmp_path, [Stage("x", {"a": {1, 2}}, lambda context: None)]).plan()


def test_a_second_build_says_who_holds_the_directory(tmp_path: Path) -> None:
    process = fork.Process(target=run, args=(tmp_path, 0.2))
    process.start()
    try:
        while not (tmp_path / ".holder.json").exists():
            time.sleep(0.01)
        with pytest.raises(GsrqError, match=f"in use by process {process.pid} on .* since 20"):
            run(tmp_path, 0)
    finally:
        process.kill()
        process.join()
    run(tmp_path, 0)  # a killed build holds nothing
    with FileLock(tmp_path / ".lock"), pytest.raises(GsrqError, match="in use by another process"):
        run(tmp_path, 0)


def test_disk_errors_say_what_to_do(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    stage = Stage("x", {}, lambda context: context.unit("a", full))
    with pytest.raises(GsrqError, match=r"stage x: the disk is full: .*/\.tmp-a(.|\n)*free space"):
        Pipeline(tmp_path, [stage]).run()
    assert [f.name for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"] == []
    with pytest.raises(GsrqError, match="the disk is full"), disk_errors("saving", tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # how safetensors puts it
    (tmp_path / "file").write_text("")
    with pytest.raises(GsrqError, match="a file stands where a directory should"):
        Pipeline(tmp_path / "file", [stage]).run()
    with pytest.raises(KeyError), disk_errors("saving", tmp_path):
        raise KeyError("other errors pass")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.symlink_to("/dev/full")
        with path.open("wb") as file:
            file.write(b"x" * 100_000)

    with pytest.raises(GsrqError, match="the disk is full"), disk_errors("saving", tmp_path):
        write_atomic(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_wrong_pipelines(tmp_path: Path) -> None:
    a, b = Stage("a", {}, lambda context: None), Stage("b", {}, lambda context: None, ("a",))
    with pytest.raises(ValueError, match=r"stage b needs \['a'\]"):
        Pipeline(tmp_path, [b, a])
    with pytest.raises(ValueError, match="'a' is taken"):
        Pipeline(tmp_path, [a, a])
    context = Context(tmp_path, {}, make_reporter())
    for name in ("../x", "/x", ".tmp-x", "stage.json"):
        with pytest.raises(ValueError, match="cannot name a unit"):
            context.unit(name, lambda path: None)


def test_progress_on_a_terminal_and_in_a_log() -> None:
    for terminal in (False, True):
        out = io.StringIO()
        reporter = make_reporter(Console(file=out, force_terminal=terminal, width=100))
        with reporter.task("outer [a]", 3) as task:
            with reporter.task("inner") as inner:
                inner.update(4, 8)
            reporter.line("a line [b]")
            task.advance(3)
        assert "outer" in out.getvalue()
        assert "a line [b]" in out.getvalue()
        assert ("outer [a]: 3 of 3" in out.getvalue()) is not terminal
        assert ("inner: 4 of 8" in out.getvalue()) is not terminal


def test_leftovers_of_removed_results_do_not_matter(tmp_path: Path) -> None:
    done = pipeline(tmp_path, seed=1).run()
    before = tree(tmp_path)
    shutil.rmtree(done["index"])
    (done["index"].with_name(done["index"].name + ".partial")).mkdir()
    pipeline(tmp_path, seed=1).run()
    assert tree(tmp_path) == before

"""What goes wrong around a build: kills, full and read-only disks, two builds at once, clock steps, damaged weights.

Run by tests/test_faults.py in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tools import faults

from gsrq_export.artifact.verify import find_problems
from gsrq_export.build.source import Source
from gsrq_export.build.stages import stages
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.model.loading import weight_files
from gsrq_export.recipe import load_recipe
from gsrq_export.stages.engine import Pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its model."""
    return faults.prepare(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed build: artifact and artifact.work."""
    root = tmp_path_factory.mktemp("calm")
    build(source, root / "artifact")
    return root


def build(recipe: Path, out: Path, *more: str) -> None:
    cli.main(["build", "--recipe", str(recipe), "--out", str(out), *more], standalone_mode=False)


def half_done(calm: Path, directory: Path, *to_do: str) -> Path:
    """A copy of the undisturbed work directory without these stages; returns where the artifact goes."""
    shutil.copytree(calm / "artifact.work", directory / "artifact.work")
    for stage in to_do:
        (path,) = (directory / "artifact.work").glob(f"{stage}-*")
        shutil.rmtree(path)
    return directory / "artifact"


def same(calm: Path, directory: Path) -> None:
    assert faults.hashes(directory) == faults.hashes(calm)


def test_the_fault_tool_on_a_few_trials(calm: Path, source: Path, tmp_path: Path) -> None:
    """The tool's own trials, of stages that take little time; the long run is in docs/reliability.md."""
    rng, tally, measured = random.Random(1), faults.Tally(), undisturbed(calm)
    for to_do in ((), ("codebooks", "profile"), ("traffic",)):
        directory = tmp_path / "-".join(("trial", *to_do))
        directory.mkdir()
        tally.add(faults.trial(source, directory, measured, to_do, rng))
    assert tally.faults == []
    assert sum(tally.kills.values()) >= 3


def undisturbed(root: Path) -> faults.Undisturbed:
    names = sorted(p.name.rsplit("-", 1)[0] for p in (root / "artifact.work").iterdir() if p.is_dir())
    return faults.Undisturbed(root, faults.hashes(root), names)


def test_the_fault_tool_sees_a_fault(calm: Path, source: Path, tmp_path: Path) -> None:
    """A byte changed behind the build's back, which keeps its size, ends in another artifact."""
    damaged, trial = tmp_path / "damaged", tmp_path / "trial"
    shutil.copytree(calm, damaged)
    (weights,) = (damaged / "artifact.work").glob("onnx-*/model.onnx.data")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    measured = undisturbed(damaged)
    measured.files = faults.hashes(calm)
    trial.mkdir()
    tally = faults.trial(source, trial, measured, (), random.Random(0))
    assert "'artifact/model.onnx.data'" in tally.faults[0]
    assert "differ from the undisturbed build's" in tally.faults[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which may be filled or made read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


@pytest.mark.parametrize("free", [0, 24 << 10, 300 << 10, 700 << 10])
def test_a_full_disk(disk: Path, calm: Path, source: Path, free: int) -> None:
    """Wherever the space ends: a clear error, nothing half-written that counts, and with space it goes on."""
    out = half_done(calm, disk, "codebooks", "profile")
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free
        file.write(b"x" * left)
    with pytest.raises(GsrqError, match="the disk is full") as caught:
        build(source, out)
    assert "free space" in caught.value.mend
    assert not out.exists()
    assert {p.name for p in disk.iterdir()} == {"artifact.work", "ballast"}
    ballast.unlink()
    build(source, out)
    same(calm, disk)


def test_a_full_disk_keeps_the_old_artifact(disk: Path, calm: Path, source: Path) -> None:
    out = half_done(calm, disk)
    build(source, out)
    before = faults.hashes(out)
    with (disk / "ballast").open("wb") as file:
        file.write(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - (200 << 10)))
    with pytest.raises(GsrqError, match="artifact: the disk is full"):
        build(source, out)
    assert faults.hashes(out) == before
    assert find_problems(out) == []
    assert {p.name for p in disk.iterdir()} == {"artifact", "artifact.work", "ballast"}


def test_a_read_only_disk(disk: Path, calm: Path, source: Path) -> None:
    out = half_done(calm, disk, "profile")
    before = faults.hashes(disk)
    remount(disk, "ro")
    with pytest.raises(GsrqError, match="the file system is read-only"):
        build(source, out)
    with pytest.raises(GsrqError, match="the file system is read-only"):
        build(source, disk / "new" / "artifact", "--work", str(disk / "new" / "work"))
    remount(disk, "rw")
    assert faults.hashes(disk) == before
    build(source, out)
    same(calm, disk)


def test_files_over_the_limit_of_a_process(calm: Path, source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE (ulimit -f), of which the system tells with EFBIG; needs no rights, unlike a full disk."""
    out = half_done(calm, tmp_path, "codebooks")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(GsrqError, match="a file is larger than is allowed"):
            build(source, out)

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not out.exists()
    build(source, out)
    same(calm, tmp_path)


def test_two_builds_at_once_into_one_work_directory(calm: Path, source: Path, tmp_path: Path) -> None:
    out = half_done(calm, tmp_path, "codebooks", "evaluate")
    first, holder = faults.start(source, out), out.with_name("artifact.work") / ".holder.json"
    while not (
        holder.exists() and f": {first}," in holder.read_text()
    ):  # else this process may be the one to get the lock
        assert faults.wait(first, 0.002) is None
    os.kill(first, signal.SIGSTOP)  # it holds the lock for as long as this process asks for it
    try:
        with pytest.raises(GsrqError, match=rf"work directory .* is in use by process {first} on"):
            build(source, out)
    finally:
        os.kill(first, signal.SIGCONT)
    assert faults.wait(first, 120) == 0
    build(source, out)
    same(calm, tmp_path)


def test_two_builds_at_once_to_one_destination(calm: Path, source: Path, tmp_path: Path) -> None:
    """Of different work directories, so that nothing keeps them apart: the last one stays, whole."""
    out = tmp_path / "artifact"
    for name in ("one", "two"):
        half_done(calm, tmp_path / name)
    for _ in range(2):
        works = [tmp_path / name / "artifact.work" for name in ("one", "two")]
        for process in [faults.start(source, out, more=("--work", str(work))) for work in works]:
            assert faults.wait(process, 120) == 0
        assert faults.hashes(out) == faults.hashes(calm / "artifact")
    assert {p.name for p in tmp_path.iterdir()} == {"artifact", "one", "two"}


def test_clock_steps(calm: Path, source: Path, tmp_path: Path) -> None:
    """Stages are keyed by content: whatever times files carry, nothing is run again and no change is missed."""
    out = half_done(calm, tmp_path)
    pipeline = Pipeline(tmp_path / "artifact.work", stages(Source(load_recipe(source))))
    day = 86_400
    for moment in (0, time.time() - 10 * 365 * day, time.time() + 10 * 365 * day):
        for path in [*tmp_path.rglob("*"), *source.parent.rglob("*")]:
            os.utime(path, (moment, moment))
        assert [p.status for p in pipeline.plan()] == ["done"] * 6
    build(source, out)
    same(calm, tmp_path)
    copy = tmp_path / "model"
    shutil.copytree(source.parent / "model", copy)  # keeps times
    recipe = copy.with_name("recipe.yaml")
    recipe.write_text(source.read_text().replace(str(source.parent / "model"), str(copy)))
    again = Pipeline(tmp_path / "artifact.work", stages(Source(load_recipe(recipe))))
    assert [p.status for p in again.plan()] == ["done"] * 6
    weights = copy / "model.safetensors"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = Pipeline(tmp_path / "artifact.work", stages(Source(load_recipe(recipe))))
    assert [p.status for p in changed.plan()] == ["to do"] * 6


def test_an_interrupted_download_of_weights(source: Path, tmp_path: Path) -> None:
    """A shard cut anywhere, or still under its temporary name, is refused by name before any work."""
    model = tmp_path / "model"
    shutil.copytree(source.parent / "model", model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, model / shard, {"format": "pt"})
        shards.update(dict.fromkeys(names, shard))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert len(weight_files(model)) == 2
    second = model / "model-00002-of-00002.safetensors"
    whole, rng = second.read_bytes(), random.Random(0)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))]:
        second.write_bytes(whole[:size])
        with pytest.raises(GsrqError, match=r"model-00002-of-00002\.safetensors are damaged or truncated"):
            weight_files(model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(source.read_text().replace(str(source.parent / "model"), str(model)))
    with pytest.raises(GsrqError, match=r"truncated(.|\n)*download the file again"):
        build(recipe, tmp_path / "artifact")
    second.rename(second.with_name(second.name + ".incomplete"))
    with pytest.raises(GsrqError, match=f"{second.name} are missing"):
        build(recipe, tmp_path / "artifact")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.yaml"}

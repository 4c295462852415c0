"""kill -9 at random points of a build, many times: does the next run end in the undisturbed artifact?

    python tests/tools/faults.py --trials 200 --out benchmarks/results/faults.json

A trial starts with a work directory in which a random set of stages is still to do: all of them (as in a first
build), or some, or none. A build of a tiny random model is killed one to three times, each time started again as a
user would, and then left alone. Half of the kills come at a random moment of the time that such a build takes; the
other half right before a random one of the file-system calls (create, rename, remove, mkdir, copy) that it makes,
where most can go wrong. After every kill what stands at the destination must be nothing or a sound artifact. In the
end every file of the artifact and of the work directory must have the undisturbed one's sha256 (locks aside), and
nothing else may stand there.

Builds run in forked children of a process that has imported everything, so that the kills fall into work, not imports.
Tracing a model for ONNX takes most of a build's time, so that stage is to do in a share of the trials only
(--export-share).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "benchmarks")]

import torch  # noqa: E402
import yaml  # noqa: E402
from families import tiny_model  # noqa: E402
from traffic.byte_tokenizer import byte_tokenizer  # noqa: E402

from gsrq_export.artifact.verify import find_problems  # noqa: E402
from gsrq_export.commands.app import cli  # noqa: E402
from gsrq_export.stages.keys import file_hash  # noqa: E402

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "traffic": {"sources": [{"kind": "self"}], "sequences": 6, "sequence_length": 64},
    "codec": {"keys": {"width": 64, "stages": 2}, "values": {"width": 32, "stages": 1}, "iterations": 2},
    "cache": {"sinks": 2, "window": 8, "block": 4},
    "export": {"max_length": 96},
    "evaluate": {"perplexity": {"sequences": 2, "length": 64}},
}
LOCKS = frozenset({".lock", ".holder.json"})
LIMIT = 300.0  # seconds after which a build counts as hung
WRITES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.copyfile"})


def prepare(directory: Path) -> Path:
    """A tiny model and its recipe; returns the recipe's file."""
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=2, head_dim=32, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
    model.save_pretrained(directory / "model")
    byte_tokenizer().save_pretrained(directory / "model")
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": {"path": str(directory / "model")}}))
    return recipe


def warm() -> None:
    """What a first export loads, loaded before the forks."""
    from tiny_artifact import RULE, export

    with tempfile.TemporaryDirectory() as directory:
        export(tiny_model("Llama", num_hidden_layers=1), Path(directory), RULE)


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is a call that changes the file system."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(isinstance(mode, str) and set(mode) & set("wax+")) or bool(
            mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        )
    return event in WRITES


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def start(
    recipe: Path, out: Path, before_write: int | None = None, count_to: int | None = None, more: tuple[str, ...] = ()
) -> int:
    """Fork a build; returns its process id.

    Args:
        before_write: it kills itself with SIGKILL right before its n-th write.
        count_to: a pipe to which it writes how many writes it made.
        more: further arguments.
    """
    child = os.fork()
    if child:
        return child
    status, made = 1, 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal made
        if writes(event, arguments):
            made += 1
            if made == before_write:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(audit)
        with _silent():
            cli.main(["build", "--recipe", str(recipe), "--out", str(out), *more], standalone_mode=False)
        if count_to is not None:
            os.write(count_to, str(made).encode())
        status = 0
    except BaseException as error:
        sys.stderr.write(f"build failed: {type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """Exit status as of waitpid, or None if it still runs then."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if (left := end - time.monotonic()) <= 0:
            return None
        time.sleep(min(0.01, left))


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file by its path; empty directories count, locks do not."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            found[f"{name}/"] = ""
        elif path.name not in LOCKS:
            found[name] = file_hash(path)
    return found


@dataclass
class Run:
    """What a build with some stages to do takes: seconds, and calls that change the file system."""

    seconds: float
    writes: int


@dataclass
class Undisturbed:
    """What builds are measured by.

    Attributes:
        root: holds the artifact and its work directory.
        files: sha256 by path below root. runs: by the stages that are to do.
    """

    root: Path
    files: dict[str, str]
    stages: list[str]
    runs: dict[tuple[str, ...], Run] = field(default_factory=dict)


def run_counted(recipe: Path, out: Path) -> Run:
    read, write = os.pipe()
    began = time.monotonic()
    status = wait(start(recipe, out, count_to=write), LIMIT)
    seconds = time.monotonic() - began
    os.close(write)
    made = os.read(read, 32)
    os.close(read)
    if status != 0 or find_problems(out):
        raise RuntimeError(f"the undisturbed build failed: status {status}, {find_problems(out)}")
    return Run(seconds, int(made))


def undisturbed(recipe: Path, root: Path) -> Undisturbed:
    run = run_counted(recipe, root / "artifact")
    names = [p.name.rsplit("-", 1)[0] for p in (root / "artifact.work").iterdir() if p.is_dir()]
    stages = sorted(names)
    return Undisturbed(root, hashes(root), stages, {tuple(stages): run})


def begin(calm: Undisturbed, to_do: tuple[str, ...], directory: Path) -> None:
    """The work directory of a build with these stages to do."""
    for stage in (calm.root / "artifact.work").iterdir():
        if stage.is_dir() and stage.name.rsplit("-", 1)[0] not in to_do:
            shutil.copytree(stage, directory / "artifact.work" / stage.name)


def draw(calm: Undisturbed, rng: random.Random, export_share: float) -> tuple[str, ...]:
    """Stages to do."""
    if rng.random() < export_share:
        return tuple(calm.stages) if rng.random() < 0.5 else ("onnx",)
    cheap = [stage for stage in calm.stages if stage != "onnx"]
    return tuple(sorted(rng.sample(cheap, rng.randint(0, len(cheap)))))


@dataclass
class Tally:
    trials: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by kind
    too_late: int = 0  # the build had ended before its kill
    moments: Counter[str] = field(default_factory=Counter)  # the stage in which a kill fell
    faults: list[str] = field(default_factory=list)

    def fault(self, log: list[str], what: str) -> Tally:
        self.faults.append(f"{', '.join(log)}: {what}")
        return self

    def add(self, other: Tally) -> None:
        self.trials += other.trials
        self.kills += other.kills
        self.too_late += other.too_late
        self.moments += other.moments
        self.faults += other.faults


def moment(out: Path) -> str:
    """Which part of a build was under way, by what it left."""
    work = out.with_name(f"{out.name}.work")
    if list(out.parent.glob(f".{out.name}.building-*")):
        return "publishing"
    partial = [p.name.rsplit("-", 1)[0] for p in work.glob("*.partial")] if work.is_dir() else []
    return partial[0] if partial else "between stages"


def trial(recipe: Path, directory: Path, calm: Undisturbed, to_do: tuple[str, ...], rng: random.Random) -> Tally:
    """One trial in an empty directory."""
    if to_do not in calm.runs:
        with tempfile.TemporaryDirectory(dir=directory.parent) as other:
            begin(calm, to_do, Path(other))
            calm.runs[to_do] = run_counted(recipe, Path(other) / "artifact")
    usual, tally = calm.runs[to_do], Tally(trials=1)
    out = directory / "artifact"
    begin(calm, to_do, directory)
    log = [f"to do: {' '.join(to_do) or 'nothing'}"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("moment", "write"))
        if kind == "moment":
            after = rng.uniform(0, usual.seconds)
            process = start(recipe, out)
            status = wait(process, after)
            log.append(f"{after:.3f} s")
            if status is None:
                kill(process)
        else:
            point = rng.randint(1, usual.writes)
            status = wait(start(recipe, out, before_write=point), LIMIT)
            log.append(f"write {point}")
        if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            tally.kills[kind] += 1
            tally.moments[moment(out)] += 1
        elif status == 0:
            tally.too_late += 1
        else:
            return tally.fault(log, f"the build failed with status {status}")
        if out.exists() and (problems := find_problems(out)):
            tally.fault(log, f"after a kill the artifact is not sound: {problems}")
    process = start(recipe, out)
    status = wait(process, LIMIT)
    if status is None:
        kill(process)
    if status != 0:
        return tally.fault(log, f"the last build ended with status {status}")
    found = hashes(directory)
    if found != calm.files:
        differ = sorted(n for n in found.keys() | calm.files.keys() if found.get(n) != calm.files.get(n))
        tally.fault(log, f"{differ} differ from the undisturbed build's")
    return tally


def run_trials(
    count: int, seed: int, export_share: float = 0.15, progress: bool = False, seconds: float = float("inf")
) -> tuple[Undisturbed, Tally]:
    """The undisturbed build, and ``count`` trials, fewer if ``seconds`` are over."""
    rng, tally, end = random.Random(seed), Tally(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gsrq-faults-") as name:
        root = Path(name)
        recipe = prepare(root)
        warm()
        (root / "calm").mkdir()
        calm = undisturbed(recipe, root / "calm")
        for i in range(count):
            if time.monotonic() > end:
                break
            with tempfile.TemporaryDirectory(dir=root) as directory:
                tally.add(trial(recipe, Path(directory), calm, draw(calm, rng, export_share), rng))
            if progress:
                sys.stderr.write(f"{i + 1} of {count}: {sum(tally.kills.values())} kills, {len(tally.faults)} faults\n")
    return calm, tally


def main() -> None:
    from environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--export-share", type=float, default=0.15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no trial after these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    calm, tally = run_trials(arguments.trials, arguments.seed, arguments.export_share, True, arguments.seconds)
    result = {
        "environment": environment(),
        "seed": arguments.seed,
        "undisturbed_seconds": round(calm.runs[tuple(calm.stages)].seconds, 2),
        "undisturbed_writes": calm.runs[tuple(calm.stages)].writes,
        "sets_of_stages_to_do": len(calm.runs),
        "files_compared": len(calm.files),
        "trials": tally.trials,
        "kills_at_a_moment": tally.kills["moment"],
        "kills_before_a_write": tally.kills["write"],
        "build_ended_before_its_kill": tally.too_late,
        "kills_by_part": dict(sorted(tally.moments.items())),
        "faults": tally.faults,
        "seconds": round(time.monotonic() - began),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()

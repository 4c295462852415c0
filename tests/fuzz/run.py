"""All fuzzers side by side until each has had its executions, and a summary of what they did.

    python tests/fuzz/run.py OUT --seconds 780 --jobs 30 --native build/fuzz

A process that is free takes the target that is furthest behind, for a slice of the time; processes of one target share
its corpus, OUT/corpus/TARGET. OUT/summary.json is put with the runs of benchmarks/results/fuzz.json for
docs/reliability.md; OUT/findings has the inputs that were faults. Exit status 1: there are some, or a target did not
get its executions.

Counted are inputs that were made; reading the corpus again at the start of a slice is not. Needs atheris==3.1.0 for the
Python targets, and for the others the two programs that tests/fuzz/native builds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Inputs a second and process, as measured on one core; the first slices replace them.
NATIVE = {"check": 6_000.0, "call": 300.0}
PYTHON = {
    "manifest": 900.0, "codebooks": 500.0, "recipe": 250.0, "fields": 1500.0,
    "traffic": 3000.0, "onnx": 700.0, "triton": 4000.0,
}  # fmt: skip
RSS_MB = 512  # of a native fuzzer, sanitizer and corpus included; python_fuzzer.py has its own limit
HANG_S = 20  # by the clock: an endless loop. Both kinds of fuzzers stop at a second of CPU themselves
MOST_FAULTS = 5  # of a target, which is then left alone
STATS = re.compile(rb"^(?:stat::)?(\w+): +([\d.]+)$", re.MULTILINE)


@dataclass
class Target:
    name: str
    rate: float  # inputs a second of one process
    executions: int = 0
    process_seconds: float = 0.0
    slowest_cpu_s: float = 0.0
    peak_rss_mb: int = 0
    grown_mb: int | None = None  # since before the first input; Python targets
    accepted: int | None = None  # inputs not refused; Python targets
    findings: list[str] = field(default_factory=list)
    corpus: int = 0  # files at the end
    running: int = 0

    @property
    def native(self) -> bool:
        return self.name in NATIVE


@dataclass
class Slice:
    """One process at work on a target."""

    target: Target
    process: subprocess.Popen[bytes]
    log: Path
    stats: Path
    prefix: Path
    started: float


class Campaign:
    def __init__(self, out: Path, targets: Sequence[Target], goal: int, seconds: float, native: Path | None) -> None:
        self.out, self.targets, self.goal, self.native = out, targets, goal, native
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.length = max(10.0, seconds / 8)  # of a slice; Python takes some seconds to start
        self.slices: list[Slice] = []
        self.count = 0
        self.leaks = True  # whether LeakSanitizer works here: it needs the right to trace
        for name in ("logs", "findings", "corpus"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for target in targets:
            corpus = out / "corpus" / target.name
            corpus.mkdir(exist_ok=True)
            for seed in (HERE / "corpus" / target.name).glob("*"):
                shutil.copy(seed, corpus)

    def behind(self, target: Target) -> float:
        """Seconds that the target's processes, and one more, need until its executions are reached."""
        return max(0, self.goal - target.executions) / (target.rate * (target.running + 1))

    def next_target(self) -> Target | None:
        left = [t for t in self.targets if t.executions < self.goal and len(t.findings) < MOST_FAULTS]
        # A target whose running processes will reach the goal within their slice needs no other.
        open_ = [t for t in left if t.executions + t.rate * t.running * self.length < self.goal]
        return max(open_, key=self.behind, default=None)

    def start(self, target: Target) -> None:
        self.count += 1
        name = f"{target.name}-{self.count}"
        log, stats, prefix = (
            self.out / "logs" / f"{name}.log",
            self.out / "logs" / f"{name}.json",
            self.out / "findings",
        )
        left = min(self.length, self.deadline - time.monotonic())
        share = (self.goal - target.executions) / (target.running + 1)
        options = [
            f"-max_total_time={max(1, int(left))}", f"-runs={max(1000, int(1.2 * share))}", f"-timeout={HANG_S}",
            "-print_final_stats=1", "-reload=1", f"-seed={self.count}", f"-artifact_prefix={prefix}/{name}-",
            "-verbosity=1",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GSRQ_FUZZ_STATS": str(stats)}
        if target.native:
            assert self.native is not None
            command = [str(self.native / f"fuzz_{target.name}"), f"-rss_limit_mb={RSS_MB}"]
            if not self.leaks:
                options.append("-detect_leaks=0")
                environment["ASAN_OPTIONS"] = "detect_leaks=0"
        else:
            command = [sys.executable, str(HERE / "python_fuzzer.py"), target.name, "-rss_limit_mb=4096"]
        corpus = self.out / "corpus" / target.name
        with log.open("wb") as file:
            process = subprocess.Popen([*command, *options, str(corpus)], stdout=file, stderr=file, env=environment)
        target.running += 1
        self.slices.append(Slice(target, process, log, stats, prefix / f"{name}-", time.monotonic()))

    def finish(self, done: Slice) -> None:
        target, text = done.target, done.log.read_bytes()
        target.running -= 1
        taken = time.monotonic() - done.started
        target.process_seconds += taken
        found = {key.decode(): float(value) for key, value in STATS.findall(text)}
        kept = json.loads(done.stats.read_text()) if done.stats.is_file() else {}
        before = [int(n) for n in re.findall(rb"^#(\d+)\s+INITED", text, re.MULTILINE)]
        executed = max(0, int(found.get("number_of_executed_units", 0)) - (before[0] if before else 0))
        target.executions += executed
        if executed > 500 or taken > 5:
            target.rate = max(1.0, 0.5 * target.rate + 0.5 * executed / taken)
        target.slowest_cpu_s = max(target.slowest_cpu_s, found.get("slowest_cpu_s", 0), kept.get("slowest_cpu_s", 0))
        target.peak_rss_mb = max(target.peak_rss_mb, int(found.get("peak_rss_mb", 0)))
        if kept:
            target.accepted = (target.accepted or 0) + kept["accepted"]
            target.grown_mb = max(target.grown_mb or 0, kept["grown_mb"])
        if b"LeakSanitizer has encountered a fatal error" in text:
            self.leaks = False
        elif done.process.returncode != 0:
            reproducers = sorted(path.name for path in done.prefix.parent.glob(done.prefix.name + "*"))
            target.findings += reproducers or [f"{done.log.name}: exit status {done.process.returncode}"]
            shutil.copy(done.log, done.prefix.parent)

    def run(self, jobs: int) -> None:
        last = self.started
        while True:
            for done in [s for s in self.slices if s.process.poll() is not None]:
                self.slices.remove(done)
                self.finish(done)
            while len(self.slices) < jobs and self.deadline - time.monotonic() > 2:
                target = self.next_target()
                if target is None:
                    break
                self.start(target)
            if not self.slices:
                break
            overdue = self.deadline + HANG_S + 10
            for late in [s for s in self.slices if time.monotonic() > overdue]:
                late.process.kill()
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"{last - self.started:.0f} s", {t.name: t.executions for t in self.targets}, flush=True)
            time.sleep(0.2)

    def summary(self, jobs: int) -> dict[str, object]:
        rows = []
        for target in self.targets:
            target.corpus = sum(1 for _ in (self.out / "corpus" / target.name).iterdir())
            row = asdict(target)
            del row["running"], row["rate"]
            rows.append(row)
        return {
            "goal": self.goal,
            "seconds": round(time.monotonic() - self.started),
            "jobs": jobs,
            "leaks_looked_for": self.leaks,
            "targets": rows,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "environment": environment(),
        }


def environment() -> dict[str, object]:
    versions = {}
    for package in ("atheris", "onnx", "protobuf", "pydantic", "PyYAML", "safetensors", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    return {"python": platform.python_version(), "cpu": cpu, "cores": os.cpu_count(), "packages": versions}


def text_of(summary: dict[str, object]) -> str:
    """The summary for a reader, a line a target."""
    lines = [f"{summary['seconds']} s, {summary['jobs']} processes, {summary['environment']}"]
    for row in summary["targets"]:  # type: ignore[attr-defined]
        accepted = "" if row["accepted"] is None else f", {row['accepted']:,} accepted"
        grown = "" if row["grown_mb"] is None else f" ({row['grown_mb']} more than at the start)"
        lines.append(
            f"{row['name']}: {row['executions']:,} executions{accepted}, slowest {row['slowest_cpu_s']:.3f} s of CPU, "
            f"{row['peak_rss_mb']} MB{grown}, corpus {row['corpus']}, findings: {', '.join(row['findings']) or 'none'}"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of each target")
    parser.add_argument("--native", type=Path, help="where fuzz_check and fuzz_call are; without it they are left out")
    parser.add_argument("--targets", nargs="+", choices=[*NATIVE, *PYTHON], help="these alone")
    args = parser.parse_args()
    rates = {**(NATIVE if args.native else {}), **PYTHON}
    names = [name for name in rates if not args.targets or name in args.targets]
    if missing := set(args.targets or ()) - set(names):
        parser.error(f"{', '.join(sorted(missing))}: give --native")
    campaign = Campaign(
        args.out.resolve(), [Target(n, rates[n]) for n in names], args.executions, args.seconds, args.native
    )
    campaign.run(args.jobs)
    summary = campaign.summary(args.jobs)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.out / "summary.txt").write_text(text_of(summary))
    print(text_of(summary))
    return int(any(t.findings or t.executions < args.executions for t in campaign.targets))


if __name__ == "__main__":
    sys.exit(main())

"""Coverage-guided fuzzing of one target of targets.py with atheris (no dependency: pip install atheris==3.1.0).

    python tests/fuzz/python_fuzzer.py manifest -max_total_time=600 -print_final_stats=1 DIRECTORY

Further arguments are libFuzzer's; DIRECTORY keeps what it finds. run.py does this for all targets at once. A fault is
also an input that takes over a second of CPU, or memory beyond what torch and ONNX took before the first input (several
hundred MiB). With GSRQ_FUZZ_STATS=FILE the file tells how many inputs were accepted, and what the slowest one took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import atheris  # noqa: E402

# PyYAML is traced where it is what reads the input.
TRACED = ["gsrq_export", "yaml"] if sys.argv[1:2] == ["recipe"] else ["gsrq_export"]
with atheris.instrument_imports(include=TRACED):
    from fuzz import mutators, targets

LIMIT_MB = 512  # more than before the first input
LIMIT_SECONDS = 1.0  # of CPU
EVERY = 500  # inputs between two looks at the memory


class Watch:
    """Runs a target's inputs and holds each to the limits."""

    def __init__(self, target: str) -> None:
        self.target, self.before = target, _peak_mb()
        self.executions = self.accepted = 0
        self.slowest = 0.0
        self.stats = os.environ.get("GSRQ_FUZZ_STATS")

    def one(self, data: bytes) -> None:
        started = time.process_time()
        self.accepted += targets.run(self.target, data)
        taken = time.process_time() - started
        self.executions += 1
        self.slowest = max(self.slowest, taken)
        if taken > LIMIT_SECONDS:
            raise TimeoutError(f"{taken:.2f} s of CPU for one input")
        if self.executions % EVERY == 0 or taken > LIMIT_SECONDS / 10:
            self.look()

    def look(self) -> None:
        grown = _peak_mb() - self.before
        if self.stats:
            found = {"executions": self.executions, "accepted": self.accepted, "slowest_cpu_s": self.slowest}
            Path(self.stats).write_text(json.dumps({**found, "grown_mb": grown, "before_mb": self.before}))
        if grown > LIMIT_MB:
            raise MemoryError(f"{grown} MiB more than before the first input")


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    target, arguments = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    for data in targets.seeds(target):
        targets.run(target, data)
    if arguments[-1][:1] != "-":
        directory = Path(arguments[-1])
        if not directory.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            for i, data in enumerate(targets.seeds(target)):
                (directory / f"seed-{i}").write_bytes(data)
    mutate = mutators.MUTATORS.get(target)
    atheris.Setup(arguments, Watch(target).one, **({"custom_mutator": mutate} if mutate else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

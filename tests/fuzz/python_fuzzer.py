"""Coverage-guided fuzzing of one target of targets.py with atheris (no dependency: pip install atheris==3.0.0).

    python tests/fuzz/python_fuzzer.py manifest -runs=1000000 -timeout=5 -report_slow_units=1 DIRECTORY

Further arguments are libFuzzer's; DIRECTORY keeps what it finds. The process holds torch and ONNX, several hundred MiB
before the first input: the limit of a target's own memory is checked here, against that.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["gsrq_export", "yaml"]):
    from fuzz import targets

LIMIT_MB = 512  # more than before the first input


def main() -> None:
    target, arguments = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
    for data in targets.seeds(target):
        targets.run(target, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(data: bytes) -> None:
        targets.run(target, data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > LIMIT_MB:
            raise MemoryError(f"{grown} MiB more than before the first input")

    if arguments[-1][:1] != "-":
        directory = Path(arguments[-1])
        directory.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(targets.seeds(target)):
            (directory / f"seed-{i}").write_bytes(data)
    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""How long the demo build takes and how much memory, from nothing, set-up aside.

    python benchmarks/demo_build.py

Runs `cli.py build --recipe recipes/demo.yaml` in a fresh directory, verifies the artifact, and writes the wall time,
the peak resident memory of the process and each stage's time to benchmarks/results/demo_build.json.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, environment

from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.native import find
from gsrq_export.report.schema import BuildMetrics


def main() -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "demo"
        start = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "cli.py"),
                "build",
                "--recipe",
                str(ROOT / "recipes/demo.yaml"),
                "--out",
                str(out),
            ],
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = verify_artifact(out)
        metrics = BuildMetrics.load(out / "metrics.json")
    assert metrics.comparison is not None
    result = {
        "environment": {**environment(), "cores": os.cpu_count(), "load_average_1min_at_start": load},
        "wall_seconds": round(seconds, 1),
        "peak_resident_bytes": peak,
        "stages_seconds": {n: float(s) for n, s in re.findall(r"(\w+): finished in ([\d.]+) s", done.stderr)},
        "native_library": find() is not None,
        "artifact_files": report.files,
        "artifact_bytes": report.size,
        "perplexity_ratio": metrics.comparison["perplexity_ratio"],
        "recall": metrics.comparison["recall"],
    }
    path = ROOT / "benchmarks/results/demo_build.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""The cases of tools/fault_cases.py in a process of their own.

They fork, which is not safe where other tests have left threads of gRPC, ONNX Runtime or OpenMP.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from families import ROOT


@pytest.mark.slow
def test_the_fault_cases() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tools/fault_cases.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment)
    print(done.stdout)  # shown with -rP or a failure: which cases were skipped
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

"""compute-sanitizer over a script of small calls of the CUDA kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gsrq_export import native
from gsrq_export.cuda.library import load

TOOLS = ["memcheck", "racecheck", "synccheck"]


def assert_clean(tool: str, script: Path, said: str) -> None:
    """The tool finds nothing in the script's calls, and the script prints ``said``; skips where there is no tool."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", native.CUDA.variable: str(load().path)}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--kernel-regex", "kernel_substring=gsrq"]
    done = subprocess.run([*command, sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[:3000] + done.stdout[3000:][-3000:] + done.stderr[-2000:]
    assert said in done.stdout

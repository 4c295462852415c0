"""Two processes calibrate on GPUs as one does. Needs nothing of ONNX.

By nccl on two GPUs; where there is one, by gloo on that. pytest -m gpu tests/gpu/test_distributed.py
"""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed.calibrations import hashes, launch, prepare, torchrun
from safetensors.torch import load_file

from gsrq_export.distributed.lifeline import EXIT

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="needs a CUDA device"),
]
WAYS = ("codebooks", "rows")
DEVICE, BACKEND = ("cuda", "nccl") if GPUS > 1 else ("cuda:0", "gloo")


def tokens(work: Path, captured: Path | None = None) -> Path:
    """A work directory with token ids, and the capture of another one."""
    ids = np.random.default_rng(0).integers(0, 257, (24, 64))
    for way in WAYS:
        (work / way).mkdir(parents=True)
        np.save(work / way / "ids.npy", ids)
        if captured:
            shutil.copytree(captured / way / "capture", work / way / "capture")
    return work


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("given"))


def arguments(recipe: Path, work: Path, device: str, *ways: str) -> list[str]:
    return ["--recipe", str(recipe), "--work", str(work), "--device", device, "--parallel", *ways]


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tokens(tmp_path_factory.mktemp("alone") / "work")
    (done,) = launch((1, arguments(recipe, work, "cuda:0", *WAYS)))
    assert done["statuses"] == [0], done["output"]
    return work


def equal_codebooks(work: Path, alone: Path, *ways: str) -> None:
    for way in ways:
        assert hashes(work / way / "codebooks") == hashes(alone / way / "codebooks"), way


def test_two_processes(recipe: Path, alone: Path, tmp_path: Path) -> None:
    """All of it, killed in an exchange: the other process, which waits on the GPU, learns it; then two go on."""
    work, shared = tokens(tmp_path / "work", alone), tokens(tmp_path / "shared", alone)
    given = arguments(recipe, work, DEVICE, "rows")
    killed, mended, codebooks, on_one = launch(
        (2, [*given, "--die", "1", "gather", "40"]),
        (2, given),
        (2, arguments(recipe, work, DEVICE, "codebooks")),
        (2, arguments(recipe, shared, "cuda:0", "rows")),
    )
    assert killed["statuses"] == [EXIT, -signal.SIGKILL], killed
    assert killed["first_to_last"] < 15, killed
    assert re.search(r"stops: rank 1 .* ended without a word", killed["output"])
    for run in (mended, codebooks):
        assert run["statuses"] == [0, 0], run["output"]
        assert f"backend {BACKEND}" in run["output"]
    equal_codebooks(work, alone, *WAYS)
    assert on_one["statuses"] == [0, 0], on_one["output"]
    assert "backend gloo" in on_one["output"]
    equal_codebooks(shared, alone, "rows")


def test_torchrun_captures_and_trains(recipe: Path, alone: Path, tmp_path: Path) -> None:
    work = tokens(tmp_path / "work")
    process = torchrun(2, arguments(recipe, work, DEVICE, *WAYS))
    try:
        log = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert f"backend {BACKEND}" in log
    for one, other in zip(shards(work), shards(alone), strict=True):
        for name, tensor in one.items():
            if name.endswith("gradient"):  # torch's backward of attention may add up in any order
                torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(tensor, other[name]), name


def shards(work: Path) -> list[dict[str, Any]]:
    return [load_file(file) for file in sorted(work.glob("*/capture/shard-*"))]

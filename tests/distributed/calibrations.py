"""A small model with a recipe, and what a calibration has written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from families import ROOT, tiny_model

from gsrq_export.model.byte_tokenizer import byte_tokenizer

HERE = Path(__file__).resolve().parent
TEXT = "".join(chr(33 + (7 * i + i * i // 5) % 90) for i in range(4000))


def prepare(directory: Path, traffic: dict[str, Any] | None = None, **codec: Any) -> Path:
    """Write a model, a text and a recipe that uses all of the codec; returns the recipe."""
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=2, head_dim=16, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)  # type: ignore[operator]
    model.save_pretrained(directory / "model")  # type: ignore[operator]
    byte_tokenizer().save_pretrained(directory / "model")
    (directory / "text.txt").write_text(TEXT)
    recipe = {
        "name": "small",
        "model": {"path": str(directory / "model")},
        "traffic": {
            "sources": [{"kind": "text", "path": str(directory / "text.txt")}],
            "sequences": 24,
            "sequence_length": 64,
            **(traffic or {}),
        },
        "codec": {
            "keys": {"width": 32, "stages": 2},
            "values": {"width": 16, "stages": 1},
            "layers": [{"layer": 1, "values": {"width": 32, "stages": 1}}],
            **{"metric": "attention", "weights": "gradient", "iterations": 2, "beam": 2, "refits": 1, **codec},
        },
        "cache": {"sinks": 2, "window": 8, "block": 4},
        "export": {"max_length": 96},
        "evaluate": None,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def environment() -> dict[str, str]:
    given = [path for path in [os.environ.get("PYTHONPATH")] if path]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE), *given])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def launch(*runs: tuple[int, list[str]], timeout: float = 120) -> list[dict[str, Any]]:
    """Runs, one after the other, by launch.py."""
    given = json.dumps([{"size": size, "arguments": arguments} for size, arguments in runs])
    command = [sys.executable, str(HERE / "launch.py")]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment(), timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def torchrun(size: int, arguments: list[str]) -> subprocess.Popen[str]:
    """A run by torch's own launcher, started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
    command += [str(HERE / "worker.py"), *arguments]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def hashes(work: Path) -> dict[str, str]:
    """sha256 of every file but the lock's."""
    files = sorted(f for f in work.rglob("*") if f.is_file() and f.name != ".lock")
    return {f.relative_to(work).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

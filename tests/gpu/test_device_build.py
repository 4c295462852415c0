"""`gsrq build` and `gsrq tune` with --device cuda, whole, against the CPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from demo import demo_directory
from safetensors.torch import load_file

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.commands.app import cli
from gsrq_export.tune.settings import EFFORTS, Effort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODEC = {
    "keys": {"width": 64, "stages": 4},
    "values": {"width": 64, "stages": 2},
    "metric": "attention",
    "weights": "gradient",
    "iterations": 3,
    "refits": 1,
    "beam": 1,
    "finetune": {"steps": 2, "batch": 2},
}


def write(directory: Path) -> Path:
    data = {
        "name": "small",
        "model": {"path": str(demo_directory())},
        "traffic": {"sequences": 8, "sequence_length": 128},
        "codec": CODEC,
        "cache": {"sinks": 2, "window": 16, "block": 8},
        "export": {"max_length": 512},
        "evaluate": None,
    }
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_build(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    logs = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        result = CliRunner().invoke(cli, ["build", "--recipe", str(recipe), "--out", str(out), "--device", device])
        assert result.exit_code == 0, (result.output, result.exception)
        verify_artifact(out)
        metrics = json.loads((out / "metrics.json").read_text())
        logs[device] = [entry["relative_mse_by_stage"][-1] for entry in metrics["distortion"]]
    assert load_manifest(tmp_path / "cpu").environment["device"] == "cpu"
    environment = load_manifest(tmp_path / "cuda").environment
    assert environment["device"] == torch.cuda.get_device_name()
    assert environment["clustering"]
    assert logs["cuda"] == pytest.approx(logs["cpu"], rel=0.05)
    words = load_file(tmp_path / "cuda" / "codebooks.safetensors")
    assert all(torch.isfinite(t.float()).all() for t in words.values())


def test_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EFFORTS, "quick", Effort(rows=600, iterations=1, rungs=3, sensed=1, compared=1))
    recipe, out = write(tmp_path), tmp_path / "tuned.yaml"
    arguments = ["tune", "--recipe", str(recipe), "--context", "512", "--sequences", "512", "--bits", "1"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--device", "cuda"])
    assert result.exit_code == 0, (result.output, result.exception)
    data = json.loads(out.with_suffix(".json").read_text())
    assert data["environment"]["device"] == torch.cuda.get_device_name()

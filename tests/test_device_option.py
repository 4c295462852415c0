"""--device of `gsrq build` and `gsrq tune`, as far as no GPU is needed; tests/gpu/test_device_build.py has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gsrq_export import GsrqError
from gsrq_export.build.device import check_device, describe_device
from gsrq_export.build.source import Source
from gsrq_export.build.stages import stages
from gsrq_export.codec import fused
from gsrq_export.commands.app import cli
from gsrq_export.recipe import load_recipe
from gsrq_export.tune.settings import EFFORTS
from gsrq_export.tune.stages import Plan, tune_stages

RECIPE = """
name: small
model: {path: MODEL}
traffic: {sequences: 8, sequence_length: 128}
codec: {keys: {width: 64, stages: 4}, finetune: {steps: 1}}
cache: {sinks: 2, window: 16, block: 8}
export: {max_length: 512}
evaluate: null
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from demo import demo_directory

    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("MODEL", str(demo_directory())))
    return path


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0", ""])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(GsrqError, match="is no device") as error:
        check_device(name)
    assert error.value.mend == "use cpu, cuda or cuda:N"


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(fused, "available", lambda device, width: False)
    assert check_device("cuda") == torch.device("cuda", 0)
    assert check_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(GsrqError, match="--device cuda:2: torch sees 2 CUDA devices") as error:
        check_device("cuda:2")
    assert error.value.mend == "use cuda:0 to cuda:1, or cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GsrqError, match="--device cuda: torch sees no CUDA device"):
        check_device("cuda")


@pytest.mark.parametrize("command", ["build", "tune"])
def test_the_commands_refuse_it_before_any_work(command: str, recipe: Path) -> None:
    more = ["--bits", "1", "--context", "512"] if command == "tune" else []
    before = set(recipe.parent.iterdir())
    out = str(recipe.parent / "out.yaml")
    arguments = [command, "--recipe", str(recipe), "--out", out, "--device", "cuda:99", *more]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, GsrqError)
    assert str(result.exception).startswith("--device cuda:99: torch sees ")
    assert set(recipe.parent.iterdir()) == before


def test_keys_of_stages_hold_the_kind_of_device(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results on a GPU differ in rounding: a stage done on one device is not taken for that of another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(fused, "library_hash", lambda device: "f00")
    monkeypatch.setattr(fused, "available", lambda device, width: True)
    given = load_recipe(recipe)
    here = {"device": "Some GPU", "clustering": "f00"}
    assert describe_device("cuda") == here
    for device, expected in (("cpu", set()), ("cuda", {"capture", "codebooks", "finetune"})):
        found = stages(Source(given, device))
        assert {s.name for s in found if here.items() <= s.material.items()} == expected
    plan = Plan.make(given, EFFORTS["quick"], 1.0, "cuda")
    found = tune_stages(plan)
    assert {s.name for s in found if here.items() <= s.material.items()} == {"capture", "ladders", "sensitivity"}
    monkeypatch.setattr(fused, "library_hash", lambda device: None)
    assert describe_device("cuda")["clustering"] == "torch"

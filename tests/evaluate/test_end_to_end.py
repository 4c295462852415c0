"""Tasks and fidelity from a recipe through a build, and from the command line on what was built."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from families import tiny_model
from traffic.byte_tokenizer import byte_tokenizer

from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.evaluate.suite import EvaluationSettings, compare, evaluate
from gsrq_export.evaluate.tasks.measure import TaskSettings
from gsrq_export.evaluate.torch_runner import TorchRunner

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "traffic": {"sequences": 6, "sequence_length": 64},
    "codec": {"keys": {"width": 64, "stages": 2}, "values": {"width": 32, "stages": 1}, "iterations": 2},
    "cache": {"sinks": 2, "window": 8, "block": 4},
    "export": {"max_length": 512},
    "evaluate": {
        "perplexity": {"sequences": 2, "length": 64},
        "tasks": {"names": ["multi-key", "variable-tracing"], "lengths": [500], "cases": 3},
        "fidelity": {"prompts": 3, "prompt_tokens": 32, "new_tokens": 24},
    },
}


def held_out() -> str:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(80)]
    return " ".join(rng.choices(words, k=1200))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model/, artifact/ and text.txt."""
    path = tmp_path_factory.mktemp("place")
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=1, head_dim=32, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    model.save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(held_out())
    recipe = {**RECIPE, "model": {"path": "model"}}
    recipe["evaluate"] = {**RECIPE["evaluate"], "text": {"kind": "text", "path": "text.txt"}}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run("build", "--recipe", path / "recipe.yaml", "--out", path / "artifact")
    assert result.exit_code == 0, (result.output, result.exception)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def check_parts(data: dict[str, Any], cases: int, new_tokens: int) -> None:
    exact, coded, comparison = data["exact"], data["coded"], data["comparison"]
    for one, other, difference in zip(exact["tasks"], coded["tasks"], comparison["tasks"], strict=True):
        assert len(one["case_scores"]) == len(other["case_scores"]) == one["cases"] == cases
        pairs = np.array(other["case_scores"]) - np.array(one["case_scores"])
        assert difference["difference"] == pairs.mean() == pytest.approx(other["score"] - one["score"])
        assert difference["interval"] == list(bootstrap_mean(pairs, 0))
    found = comparison["fidelity"]
    assert found["prompts"] == 3
    assert found["new_tokens"] == new_tokens
    assert found["kl"]["mean"] > 1e-4
    assert 0 < found["top1_agreement"]["mean"] <= 1
    low, high = found["agreed_tokens"]["interval"]
    assert 0 <= low <= found["agreed_tokens"]["mean"] <= high <= new_tokens
    assert all(len(found[part]["per_prompt"]) == 3 for part in ("kl", "top1_agreement", "agreed_tokens"))


def test_a_build_measures_what_its_recipe_asks_for(place: Path) -> None:
    assert run("verify", "--artifact", place / "artifact").exit_code == 0
    metrics = json.loads((place / "artifact/metrics.json").read_text())
    assert [(row["task"], row["tokens"]) for row in metrics["exact"]["tasks"]] == [
        ("multi-key", 500),
        ("variable-tracing", 500),
    ]
    check_parts(metrics, 3, 24)


def test_the_command_prints_and_writes_all_of_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "figures.json"
    start = ["eval", "--artifact", place / "artifact", "--text", place / "text.txt", "--json", out]
    start += ["--window-tokens", 64, "--windows", 2, "--task-length", 500, "--task-cases", 2]
    too_long = run(*start, "--task", "multi-query")
    assert isinstance(too_long.exception, GsrqError)
    assert "task multi-query at length 500: the task's passages need" in str(too_long.exception)
    assert not out.exists()

    arguments = [*start, "--task", "multi-value"]
    alone = run(*arguments)
    assert alone.exit_code == 0, (alone.output, alone.exception)
    assert json.loads(out.read_text()).keys() == {"coded"}
    assert "multi-value at 500, 2 cases" in alone.output

    pair = run(
        *arguments, "--model", place / "model", "--fidelity", 3, "--fidelity-prompt", 40, "--fidelity-tokens", 20
    )
    assert pair.exit_code == 0, (pair.output, pair.exception)
    data = json.loads(out.read_text())
    check_parts(data, 2, 20)
    assert data["comparison"]["fidelity"]["prompt_tokens"] == 40
    for part in ("coded - exact", "same most likely token", "KL, nats a token", "tokens until it departs"):
        assert part in pair.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text is missing"),
        (["--text", "text.txt", "--fidelity", "2"], "--fidelity compares with the unquantized model"),
        (["--text", "text.txt", "--task-length", "99"], "--task-length 99 without a task"),
        (["--tasks", "piqa", "--task", "multi-key"], "--text is missing"),
        (["--text", "text.txt", "--limit", "3"], "options of lm-eval without --tasks"),
        (["--tasks", " , "], "--tasks names no task"),
    ],
)
def test_what_does_not_go_together_is_refused(place: Path, arguments: list[str], message: str) -> None:
    given = [str(place / a) if a == "text.txt" else a for a in arguments]
    result = run("eval", "--artifact", place / "artifact", *given)
    assert isinstance(result.exception, GsrqError)
    assert message in str(result.exception)


def test_settings_left_alone_measure_what_they_did(place: Path) -> None:
    model, tokenizer = tiny_model("Llama", vocab_size=257, num_hidden_layers=1), byte_tokenizer()
    settings = EvaluationSettings(window_tokens=64, windows=2, recall_lengths=())
    assert settings.steps == 2
    found = evaluate(TorchRunner(model), tokenizer, held_out(), settings)
    assert found.keys() == {"perplexity", "recall", "seed"}
    assert compare(found, found).keys() == {"perplexity_ratio", "nll_increase", "recall"}
    more = replace(settings, tasks=TaskSettings(("multi-key",), (500,), 2))
    assert more.steps == 4
    with_tasks = evaluate(TorchRunner(model), tokenizer, held_out(), more)
    assert with_tasks["perplexity"] == found["perplexity"]
    with pytest.raises(GsrqError, match="tasks differs"):
        compare(found, with_tasks)

"""Perplexity and recall of the real demo model; refusals; the statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from demo import demo, demo_text
from families import tiny_model

from gsrq_export import GsrqError
from gsrq_export.evaluate.perplexity import perplexity, pick_windows
from gsrq_export.evaluate.recall import make_cases, recall
from gsrq_export.evaluate.stats import bootstrap_mean, wilson
from gsrq_export.evaluate.suite import EvaluationSettings, compare, evaluate
from gsrq_export.evaluate.torch_runner import TorchRunner

SETTINGS = EvaluationSettings(window_tokens=256, windows=6, recall_lengths=(512, 1024), recall_cases=12, batch=6)


class Forgetful(TorchRunner):
    """The real model, but it sees only the last 60 tokens of a prompt."""

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        return super().greedy([prompt[-60:] for prompt in prompts], max_new_tokens)


def test_demo_model_recalls() -> None:
    model, tokenizer = demo()
    done: list[int] = []
    exact = evaluate(TorchRunner(model), tokenizer, demo_text(), SETTINGS, done.append)
    assert sum(done) == SETTINGS.steps == 6 + 2 * 12
    json.dumps(exact, allow_nan=False)
    # The text is the model's own sample, so its perplexity is that of its entropy.
    assert 8 < exact["perplexity"]["perplexity"] < 60
    low, high = exact["perplexity"]["interval"]
    assert low < exact["perplexity"]["perplexity"] < high
    assert exact["perplexity"]["scored_tokens"] == 6 * 255
    assert exact["recall"] is not None
    at512, at1024 = exact["recall"]["lengths"]
    assert (at512["tokens"], at1024["tokens"]) == (512, 1024)
    assert at512["correct"] >= 10
    assert at1024["correct"] >= 9
    for row in (at512, at1024):
        assert sum(part["cases"] for part in row["by_depth"].values()) == 12
        assert sum(part["correct"] for part in row["by_depth"].values()) == row["correct"]
        assert row["interval"] == list(wilson(row["correct"], 12))

    coded = evaluate(Forgetful(model), tokenizer, demo_text(), replace(SETTINGS, windows=6))
    cost = compare(exact, coded)
    assert cost["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    assert [row["tokens"] for row in cost["recall"]] == [512, 1024]
    assert all(row["coded"] <= 0.25 and row["retained"] is not None for row in cost["recall"]), "it cannot know"
    other = {**coded["perplexity"], "prompt_tokens": 99}
    with pytest.raises(GsrqError, match=r"perplexity\.prompt_tokens differs: 1 for the exact model, 99"):
        compare(exact, {**coded, "perplexity": other})  # type: ignore[typeddict-item]
    with pytest.raises(GsrqError, match="recall lengths differs"):
        compare(exact, {**coded, "recall": None})


def test_cases_do_not_depend_on_the_batch_or_on_each_other() -> None:
    model, tokenizer = demo()
    ids = tokenizer.encode(demo_text(), add_special_tokens=False)
    runs = [
        recall(TorchRunner(model), tokenizer, ids, lengths=lengths, cases=5, batch=batch, seed=3)
        for lengths, batch in (((300,), 2), ((200, 300), 5))
    ]
    assert runs[0]["lengths"][0] == runs[1]["lengths"][1]
    first = make_cases(ids, tokenizer, 300, 5, 3)
    assert {len(case.prompt) + len(case.answer) for case in first} == {300}
    assert [c.fact for c in first[:3]] == [c.fact for c in make_cases(ids, tokenizer, 300, 3, 3)]
    assert [c.fact for c in first] != [c.fact for c in make_cases(ids, tokenizer, 300, 5, 4)]


def test_broken_models_are_refused_not_averaged() -> None:
    model = tiny_model("Llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 0] = math.nan
    with pytest.raises(GsrqError, match=r"perplexity: .* token likelihoods are NaN or infinite"):
        perplexity(TorchRunner(model), [3, 4, 5, 6] * 30, window_tokens=20, windows=3)


def test_refusals_before_anything_runs() -> None:
    model, tokenizer = demo()
    for changes, message in (
        ({"windows": 0}, "evaluation.windows: 0 is below 1"),
        ({"prompt_tokens": 256}, "evaluation.prompt_tokens: 256 leaves nothing to score in windows of 256"),
    ):
        with pytest.raises(GsrqError, match=message):
            replace(SETTINGS, **changes)  # type: ignore[arg-type]

    class Untouched(TorchRunner):
        def nll(self, ids: torch.Tensor, start: int = 1) -> torch.Tensor:
            raise AssertionError("ran")

    for settings, text, message in (
        (replace(SETTINGS, window_tokens=4096), demo_text(), "4096 exceeds the model's 2048 tokens"),
        (replace(SETTINGS, recall_lengths=(4096,)), demo_text(), "recall length 4096 exceeds the model's 2048 tokens"),
        (SETTINGS, "too short", "fewer than one window of 256"),
        (replace(SETTINGS, recall_lengths=(2000,)), demo_text()[:3000], "the haystack has"),
        (replace(SETTINGS, recall_lengths=(40,)), demo_text(), "recall length 40: 4 facts and a question take"),
    ):
        with pytest.raises(GsrqError, match=message):
            evaluate(Untouched(model), tokenizer, text, settings)
    with pytest.raises(GsrqError, match="use the tokenizer that belongs to the model"):
        evaluate(TorchRunner(tiny_model("Llama")), tokenizer, demo_text(), replace(SETTINGS, recall_lengths=()))


def test_windows_do_not_overlap() -> None:
    ids = list(range(1000))
    windows = pick_windows(ids, 90, 4)
    starts = windows[:, 0].tolist()
    assert windows.shape == (4, 90)
    assert starts == [0, 180, 450, 720]
    assert torch.equal(windows[2], torch.arange(450, 540))
    assert len(pick_windows(ids, 90, 99)) == 11


def test_statistics() -> None:
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 .. 0.3662; 0 of 20 gives 0 .. 0.1611.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        wilson(3, 2)
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_mean(rng.normal(2.0, 1.0, 40), seed, 400)
        hits += low <= 2.0 <= high
    assert 176 <= hits <= 200, "a 95 % interval covers the mean about 95 times in 100"
    values = rng.normal(size=9)
    assert bootstrap_mean(values, 5) == bootstrap_mean(values, 5)

"""Fidelity against the definitions, on tiny models whose coded side is really coded; its record's rounding."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from demo import demo, demo_text
from families import tiny_model
from small_codes import RULE, codebooks, token_ids, with_start_token
from tiny_artifact import tiny_artifact
from traffic.byte_tokenizer import byte_tokenizer

from gsrq_export import GsrqError, coded
from gsrq_export.evaluate import fidelity as module
from gsrq_export.evaluate import torch_runner
from gsrq_export.evaluate.fidelity import FidelitySettings, Record, fidelity, record
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.runtime.session import OrtModel

SETTINGS = FidelitySettings(prompts=3, prompt_tokens=20, new_tokens=30)


class NoStart:
    """The test models have no tokenizer; all that is asked of one is whether it puts a token first."""

    bos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [5]


def text_ids() -> list[int]:
    return token_ids(1, 400)[0].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def stepwise(model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [B, T - start, vocab], token by token after the prompt."""
    out = model(ids[:, :start], use_cache=True)
    found = [out.logits[:, -1]]
    for t in range(start, ids.shape[1] - 1):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("exact_prefill", [False, True])
def test_metrics_follow_their_definitions(exact_prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    done: list[int] = []
    recorded = record(TorchRunner(model), NoStart(), text_ids(), SETTINGS, batch=2, seed=7, progress=done.append)
    ids, wanted = recorded.ids, recorded.ids[:, 20:]
    assert ids.shape == (3, 50)
    exact = stepwise(model, ids, 20).double().log_softmax(-1)
    assert torch.equal(exact.argmax(-1), wanted), "the continuation is the model's greedy one"

    monkeypatch.setattr(torch_runner, "LOGITS_BYTES", 4 * 97 * 2 * 7)  # chunks of 7 tokens
    with coded(model, codebooks(model), RULE, exact_prefill=exact_prefill):
        found = fidelity(TorchRunner(model, exact_prefill), recorded, batch=2, progress=done.append)
        logits = stepwise(model, ids, 20)
        own = TorchRunner(model).greedy(ids[:, :20].tolist(), 30)
    assert done == [2, 1, 2, 1]
    assert {key: found[key] for key in ("prompts", "prompt_tokens", "new_tokens")} == {
        "prompts": 3,
        "prompt_tokens": 20,
        "new_tokens": 30,
    }
    kl = (exact.exp() * (exact - logits.double().log_softmax(-1))).sum(-1).mean(1)
    assert found["kl"]["per_prompt"] == pytest.approx(kl.tolist(), rel=1e-3)
    assert min(found["kl"]["per_prompt"]) > 0.01, "random codebooks cost something"
    shares = (logits.argmax(-1) == wanted).double().mean(1)
    assert found["top1_agreement"]["per_prompt"] == pytest.approx(shares.tolist())
    agreed = [
        next((t for t in range(30) if mine[t] != theirs[t]), 30)
        for mine, theirs in zip(own, wanted.tolist(), strict=True)
    ]
    assert found["agreed_tokens"]["per_prompt"] == agreed
    assert min(agreed) < 30
    for part in (found["kl"], found["top1_agreement"], found["agreed_tokens"]):
        values = np.array(part["per_prompt"])
        assert part["mean"] == pytest.approx(values.mean())
        assert part["interval"] == list(bootstrap_mean(values, 7))
    json.dumps(found, allow_nan=False)


def test_an_artifact_is_measured_as_its_torch_twin_is() -> None:
    artifact = tiny_artifact(exact_prefill=True)
    recorded = record(TorchRunner(artifact.model), NoStart(), text_ids(), replace(SETTINGS, prompts=2))
    deployed = fidelity(OrtRunner(OrtModel(artifact.path)), recorded)
    with coded(artifact.model, artifact.codebooks, artifact.rule, exact_prefill=True, exact_dtype=torch.float32):
        same = fidelity(TorchRunner(artifact.model, exact_prefill=True), recorded)
    assert deployed["kl"]["per_prompt"] == pytest.approx(same["kl"]["per_prompt"], rel=0.05)
    assert deployed["top1_agreement"]["mean"] == pytest.approx(same["top1_agreement"]["mean"], abs=0.05)


def test_rounding_of_the_record_is_negligible() -> None:
    """On the trained demo model: against itself, and against the truth in float64 for a mildly disturbed one."""
    model, tokenizer = demo()
    ids = tokenizer.encode(demo_text(), add_special_tokens=False)
    settings = FidelitySettings(prompts=3, prompt_tokens=64, new_tokens=48)
    runner = TorchRunner(model)
    recorded = record(runner, tokenizer, ids, settings)
    itself = fidelity(runner, recorded)
    assert itself["top1_agreement"]["mean"] == 1.0
    assert itself["agreed_tokens"]["per_prompt"] == [48.0] * 3
    assert abs(itself["kl"]["mean"]) < 1e-5
    exact = torch.cat(list(runner.logits(recorded.ids, 64)), 1)
    torch.manual_seed(0)
    other = exact + 0.1 * torch.randn_like(exact)
    truth = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), exact.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    rounded = module._kl(recorded.log_probs, other)
    assert 1e-3 < truth.mean() < 1e-1, "as much as good codebooks cost"
    assert abs(rounded.mean() - truth.mean()) < 1e-5
    assert (rounded - truth).abs().max() < 1e-3


def test_a_longer_exact_window_scores_better() -> None:
    model = tiny_model("Llama")
    recorded = record(TorchRunner(model), NoStart(), text_ids(), SETTINGS)
    found = []
    for window in (8, 32):
        with coded(model, codebooks(model), replace(RULE, window=window)):
            found.append(fidelity(TorchRunner(model), recorded))
    assert found[1]["kl"]["mean"] < found[0]["kl"]["mean"]
    assert found[1]["top1_agreement"]["mean"] > found[0]["top1_agreement"]["mean"]
    assert found[1]["agreed_tokens"]["mean"] > found[0]["agreed_tokens"]["mean"]


def test_a_start_token_opens_the_prompts() -> None:
    tokenizer = with_start_token(byte_tokenizer())
    model = tiny_model("Llama", vocab_size=257)
    recorded = record(TorchRunner(model), tokenizer, text_ids(), SETTINGS)
    assert recorded.ids[:, 0].tolist() == [0] * 3
    assert recorded.ids[0, 1:20].tolist() == text_ids()[:19]
    assert recorded.ids.shape == (3, 50)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TorchRunner(tiny_model("Llama"))

    class Untouched(TorchRunner):
        def greedy(self, *arguments: object, **more: object) -> list[list[int]]:
            raise AssertionError("ran")

    untouched = Untouched(tiny_model("Llama"))
    with pytest.raises(GsrqError, match=r"evaluation\.fidelity\.new_tokens: 0 is below 1"):
        replace(SETTINGS, new_tokens=0)
    with pytest.raises(GsrqError, match=r"new_tokens: 500 after 20 exceed the model's 512 tokens"):
        record(untouched, NoStart(), text_ids(), replace(SETTINGS, new_tokens=500))
    with pytest.raises(GsrqError, match="10 tokens are fewer than one window of 20"):
        record(untouched, NoStart(), text_ids()[:10], SETTINGS)
    recorded = record(runner, NoStart(), text_ids(), replace(SETTINGS, new_tokens=4))
    with pytest.raises(GsrqError, match="the unquantized model has 97 tokens, the coded one 99"):
        fidelity(TorchRunner(tiny_model("Llama", vocab_size=99)), recorded)
    broken = tiny_model("Llama")
    with torch.no_grad():
        broken.get_output_embeddings().weight[5, 0] = math.nan
    with pytest.raises(GsrqError, match="log-probabilities of the unquantized model are NaN"):
        record(TorchRunner(broken), NoStart(), text_ids(), replace(SETTINGS, new_tokens=4))
    with pytest.raises(GsrqError, match="log-probabilities of the coded model are NaN"):
        fidelity(TorchRunner(broken), recorded)
    monkeypatch.setattr(module, "RECORD_BYTES", 2 * 2 * 30 * 97)
    with pytest.raises(GsrqError, match=r"prompts: 3 prompts take 17460 bytes .*, over 11640\n.*at most 2 prompts"):
        record(untouched, NoStart(), text_ids(), SETTINGS)
    assert isinstance(record(runner, NoStart(), text_ids(), replace(SETTINGS, prompts=2)), Record)

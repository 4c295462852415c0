"""TorchRunner against the model's own forward and generate, plain and coded."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from small_codes import RULE, codebooks, token_ids
from tiny_artifact import tiny_artifact

from gsrq_export import GsrqError, coded
from gsrq_export.evaluate import torch_runner
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.runtime.session import OrtModel


@torch.no_grad()
def reference_nll(model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The first ``start`` tokens in one call, then token by token: what decoding sees."""
    out = model(ids[:, :start], use_cache=True)
    found = []
    for t in range(start, ids.shape[1]):
        log = out.logits[:, -1].log_softmax(-1)
        found.append(-log.gather(1, ids[:, t : t + 1])[:, 0])
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(found, 1)


@pytest.mark.parametrize("start", [1, 17, 52])
@pytest.mark.parametrize("exact_prefill", [False, True])
def test_coded_nll_is_what_decoding_sees(start: int, exact_prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("Llama"), token_ids(3, 53)
    with coded(model, codebooks(model), RULE, exact_prefill=exact_prefill):
        expected = reference_nll(model, ids, start)
        runner = TorchRunner(model, exact_prefill=exact_prefill)
        got = runner.nll(ids, start)
        monkeypatch.setattr(torch_runner, "LOGITS_BYTES", 4 * 97 * 3 * 7)  # chunks of 7 tokens
        chunked = runner.nll(ids, start)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(chunked, expected, atol=1e-3, rtol=1e-3)
    plain = TorchRunner(model).nll(ids, start)
    # The one token scored from an exact prefill alone has seen nothing coded.
    assert torch.allclose(plain, expected, atol=1e-2) == (exact_prefill and start == 52)


@torch.no_grad()
def test_plain_nll_is_the_models_own() -> None:
    model, ids = tiny_model("Qwen3"), token_ids(2, 41)
    logits = model(ids[:, :-1]).logits.log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(TorchRunner(model).nll(ids), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(TorchRunner(model).nll(ids, 30), expected[:, 29:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_codes", [False, True])
def test_greedy_of_unequal_prompts_is_generate_of_each(with_codes: bool) -> None:
    model = tiny_model("Llama")
    rows = token_ids(4, 50).tolist()
    prompts = [rows[0][:50], rows[1][:23], rows[2][:1], rows[3][:23]]

    def check() -> None:
        answers = TorchRunner(model).greedy(prompts, 9)
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=9,
                do_sample=False,
                eos_token_id=[],
                pad_token_id=0,
            )
            assert answer == whole[0, len(prompt) :].tolist()

    if with_codes:
        with coded(model, codebooks(model), RULE):
            check()
    else:
        check()


@pytest.mark.parametrize("kind", ["torch", "ort"])
def test_rows_end_where_they_are_told_to(kind: str) -> None:
    artifact = tiny_artifact()
    runner: Runner = TorchRunner(artifact.model) if kind == "torch" else OrtRunner(OrtModel(artifact.path))
    prompts = [row[: 20 + 3 * i] for i, row in enumerate(token_ids(4, 40).tolist())]
    whole = runner.greedy(prompts, 12)
    assert {len(answer) for answer in whole} == {12}
    ends = [whole[0][4], whole[1][0]]
    calls: list[int] = []

    def until(answer: list[int]) -> bool:
        calls.append(len(answer))
        return answer[-1] in ends

    cut = [next((t + 1 for t, token in enumerate(answer) if token in ends), 12) for answer in whole]
    assert min(cut) == 1
    answers = runner.greedy(prompts, 12, until)
    assert answers == [answer[:size] for answer, size in zip(whole, cut, strict=True)]
    assert len(calls) == sum(cut), "a row that has ended is not asked again"
    assert runner.greedy(prompts, 12) == whole, "nothing is left over"


@torch.no_grad()
def test_logits_come_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("Qwen3"), token_ids(2, 41)
    monkeypatch.setattr(torch_runner, "LOGITS_BYTES", 4 * 97 * 2 * 7)
    chunks = list(TorchRunner(model).logits(ids, 20))
    assert [chunk.shape[1] for chunk in chunks] == [1, 7, 7, 6]
    torch.testing.assert_close(torch.cat(chunks, 1), model(ids).logits[:, 19:-1], atol=1e-3, rtol=1e-3)


def test_logits_of_an_artifact_may_be_left_half_way() -> None:
    model = OrtModel(tiny_artifact(exact_prefill=True).path)
    ids = token_ids(2, 41)
    part = OrtRunner(model).logits(ids, 30)
    assert next(part).shape == next(part).shape == (2, 1, 97)
    part.close()  # type: ignore[attr-defined]
    assert model.lengths.tolist() == []


def test_bad_input_is_refused() -> None:
    runner = TorchRunner(tiny_model("Llama"))
    ids = token_ids(1, 20)
    with pytest.raises(GsrqError, match=r"token 97 is outside the vocabulary 0 \.\. 96"):
        runner.nll(ids.index_fill(1, torch.tensor([3]), 97))
    with pytest.raises(GsrqError, match=r"start: 20 is outside 1 \.\. 19"):
        runner.nll(ids, 20)
    with pytest.raises(GsrqError, match="513 tokens exceed the model's 512"):
        runner.nll(token_ids(1, 513))
    with pytest.raises(GsrqError, match=r"prompts\[1\] is empty"):
        runner.greedy([[3], []], 2)
    with pytest.raises(GsrqError, match=r"prompts\[0\]: 500 tokens and 13 new ones exceed the model's 512"):
        runner.greedy([[3] * 500], 13)
    with pytest.raises(GsrqError, match=r"prompts\[0\]: token -1"):
        runner.greedy([[-1]], 1)

"""Packing, sampling, planting: exact lengths, determinism, and where the text is drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from demo import demo_directory
from families import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gsrq_export.errors import GsrqError
from gsrq_export.recipe import TrafficRecipe
from gsrq_export.traffic.build import allocate, build_traffic, traffic_material
from gsrq_export.traffic.sample import sample_sequences
from gsrq_export.traffic.tokens import reservoir


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_directory())


def recipe(*sources: dict[str, Any], **fields: Any) -> TrafficRecipe:
    return TrafficRecipe.model_validate({"sources": list(sources), **fields})


def numbered(path: Path, words: int) -> Path:
    path.write_text(" ".join(f"{i:06d}" for i in range(words)))
    return path


@pytest.mark.parametrize(
    ("words", "length", "count"), [(30_000, 97, 20), (3_000, 97, 150), (2_000, 54, 256), (41, 287, 1)]
)
def test_sequences_are_runs_of_the_text_from_all_over_it(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, words: int, length: int, count: int
) -> None:
    path = numbered(tmp_path / "a.txt", words)
    made = recipe({"kind": "text", "path": str(path)}, sequence_length=length, sequences=count)
    traffic = build_traffic(made, tiny_tokenizer, vocab_size=257)
    assert traffic.ids.shape == (count, length)
    assert traffic.ids.dtype == np.int64
    text = path.read_text()
    starts = []
    for row in traffic.ids:
        at = text.find(tiny_tokenizer.decode(row[row != 0]))
        assert at >= 0
        starts.append(at)
    assert len(set(starts)) == count
    if count > 10:  # not only the head: quarters are hit evenly enough
        quarters = np.bincount(np.asarray(starts) * 4 // len(text), minlength=4)
        assert quarters.min() >= count / 20
    again = build_traffic(made, tiny_tokenizer, vocab_size=257)
    assert np.array_equal(again.ids, traffic.ids)
    assert again.sha256 == traffic.sha256
    other = build_traffic(made.model_copy(update={"seed": 1}), tiny_tokenizer, vocab_size=257)
    assert other.sha256 == traffic.sha256  # the same content
    if count > 1:
        assert not np.array_equal(other.ids, traffic.ids)


def test_documents_are_separated_by_the_end_of_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": c * 9}) for c in "abcdefgh"))
    made = recipe({"kind": "jsonl", "path": str(path)}, sequence_length=80, sequences=1)
    traffic = build_traffic(made.model_copy(update={"sequence_length": 80}), tiny_tokenizer)
    assert tiny_tokenizer.decode(traffic.ids[0]) == "".join(c * 9 + "<eos>" for c in "abcdefgh")
    assert traffic.stats["sources"][0]["documents"] == 8


def test_a_tokenizer_with_a_begin_token(tmp_path: Path, demo_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    path = numbered(tmp_path / "a.txt", 3000)
    made = recipe({"kind": "text", "path": str(path)}, sequence_length=128, sequences=4, recall_share=1.0)
    inner = PreTrainedTokenizerFast(
        tokenizer_object=type(demo_tokenizer._tokenizer).from_str(demo_tokenizer._tokenizer.to_str()),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    inner._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ids = build_traffic(made, inner).ids
    assert ids.shape == (4, 128)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1:] != 0).all()


def test_too_little_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = numbered(tmp_path / "a.txt", 100)  # 699 bytes and an end of text
    source = {"kind": "text", "path": str(path)}
    with pytest.raises(GsrqError) as caught:
        build_traffic(recipe(source, sequence_length=100, sequences=9), tiny_tokenizer)
    assert "700 tokens make 7 sequences of 100, 9 are wanted" in str(caught.value)
    assert "lower traffic.sequences to 7" in str(caught.value)
    with pytest.raises(GsrqError, match=r"make 0 sequences of 1024, 64 are wanted"):
        build_traffic(recipe(source), tiny_tokenizer)


def test_wrong_tokenizer(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(GsrqError, match="makes ids up to 256, the model has 97 embeddings"):
        build_traffic(recipe({"kind": "self"}), tiny_tokenizer, tiny_model("Llama"))


def test_shares() -> None:
    def shares(*given: float, sequences: int) -> list[int]:
        return allocate(recipe(*({"kind": "self", "share": s} for s in given), sequences=sequences))

    assert shares(1, sequences=7) == [7]
    assert shares(1, 1, sequences=7) in ([4, 3], [3, 4])
    assert shares(1000, 1, sequences=10) == [9, 1]
    assert sum(shares(0.3, 0.3, 0.4, 0.01, sequences=61)) == 61
    with pytest.raises(GsrqError, match="fewer than the 3 sources"):
        shares(1, 1, 1, sequences=2)


def test_reservoir_is_uniform() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(20)
    for _ in range(2000):
        kept, seen = reservoir(([i] for i in range(20)), 5, rng)  # type: ignore[misc]
        assert seen == 20
        assert kept == sorted(kept)
        hits[[k[0] for k in kept]] += 1  # type: ignore[list-item]
    assert np.abs(hits / 2000 - 0.25).max() < 0.05


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral"])
def test_sampling_draws_from_the_model(name: str) -> None:
    """Each token is the Gumbel maximum of logits that a single full forward pass gives, too."""
    model, count, length, temperature = tiny_model(name), 3, 70, 0.8
    ids = sample_sequences(model, 1, count, length, temperature, seed=5)
    assert ids.shape == (count, length)
    assert (ids[:, 0] == 1).all()
    assert np.array_equal(ids, sample_sequences(model, 1, count, length, temperature, seed=5))
    assert not np.array_equal(ids, sample_sequences(model, 1, count, length, temperature, seed=6))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.double().numpy() / temperature
    rng = np.random.default_rng([5, 0])
    for i in range(1, length):
        score = logits[:, i - 1] - np.log(-np.log(rng.random((count, 97)) + 1e-300))
        best = score.max(-1)
        assert (best - score[np.arange(count), ids[:, i]] < 1e-3).all()


def test_self_traffic_of_several_batches(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("Llama", vocab_size=257)
    calls: list[tuple[str, int, int | None]] = []
    report: Callable[..., None] = lambda *call: calls.append(call)  # noqa: E731
    made = recipe({"kind": "self"}, sequence_length=16, sequences=40)
    traffic = build_traffic(made, tiny_tokenizer, model, progress=report)
    assert traffic.ids.shape == (40, 16)
    assert calls[-1][1:] == (600, 600)
    assert len({row.tobytes() for row in traffic.ids}) == 40


def test_material_follows_contents_not_paths(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.txt", 9), numbered(tmp_path / "b.txt", 9)
    of_a = traffic_material(recipe({"kind": "text", "path": str(a)}))
    assert of_a == traffic_material(recipe({"kind": "text", "path": str(b)}))
    assert str(tmp_path) not in json.dumps(of_a)
    b.write_text("other")
    assert of_a != traffic_material(recipe({"kind": "text", "path": str(b)}))


def test_recall_share_plants_into_that_many(tmp_path: Path, demo_tokenizer: Any) -> None:
    path = numbered(tmp_path / "a.txt", 9000)
    made = recipe({"kind": "text", "path": str(path)}, sequence_length=256, sequences=12, recall_share=0.25)
    traffic = build_traffic(made, demo_tokenizer, vocab_size=4096)
    assert traffic.ids.shape == (12, 256)
    planted = ["secret code" in demo_tokenizer.decode(row) for row in traffic.ids]
    assert sum(planted) == traffic.stats["recall_sequences"] == 3

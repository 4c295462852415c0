"""Streaming generation with the trained demo model; sampling; incremental decoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from demo import demo, demo_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifact import export

from gsrq_export import CacheRule, GsrqError
from gsrq_export.errors import ArtifactError
from gsrq_export.runtime.detokenize import Detokenizer
from gsrq_export.runtime.generate import Generation, Sampling, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel

PROMPT = "It was a dark evening, and the old man"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """demo-6m with a window that keeps 100 tokens exact; random codebooks."""
    path = tmp_path_factory.mktemp("demo")
    export(demo()[0], path, CacheRule(4, 100, 16), max_length=160)
    (path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copyfile(demo_directory() / name, path / "tokenizer" / name)
    yield path
    shutil.rmtree(path)


def test_greedy_text_is_the_models_own(artifact: Path) -> None:
    model, tokenizer = demo()
    made = Generation(OrtModel(artifact), load_tokenizer(artifact), PROMPT, max_new_tokens=60, eos=load_eos(artifact))
    pieces = list(made)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
    assert made.new_tokens == [token for token in out if token != 0]
    assert "".join(pieces) == tokenizer.decode(out, skip_special_tokens=True)
    assert len(pieces) > 30, "it streams"
    assert made.stop == ("eos" if 0 in out else "max_new_tokens")


def test_stops(artifact: Path) -> None:
    model, tokenizer = OrtModel(artifact), load_tokenizer(artifact)
    assert load_eos(artifact) == {0}
    greedy = Generation(model, tokenizer, PROMPT, max_new_tokens=8)
    assert greedy.stop is None
    list(greedy)
    assert greedy.stop == "max_new_tokens"
    third = greedy.new_tokens[2]
    stopped = Generation(model, tokenizer, PROMPT, max_new_tokens=8, eos=frozenset([third]))
    list(stopped)
    assert stopped.stop == "eos"
    assert stopped.new_tokens == greedy.new_tokens[: greedy.new_tokens.index(third)]
    long = Generation(model, tokenizer, [5] * 157, max_new_tokens=50)
    list(long)
    assert long.stop == "max_length"
    assert len(long.new_tokens) == 4, "the last token needs no place in the cache"


def test_sampled_text_depends_on_the_seed_only(artifact: Path) -> None:
    model, tokenizer = OrtModel(artifact), load_tokenizer(artifact)
    texts = [
        "".join(Generation(model, tokenizer, PROMPT, max_new_tokens=20, sampling=Sampling(0.9, 50, 0.95, seed)))
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_refusals(artifact: Path, tmp_path: Path) -> None:
    model, tokenizer = OrtModel(artifact), load_tokenizer(artifact)
    for prompt, count, message in (
        ("", 5, "the prompt is empty"),
        (PROMPT, 0, "max_new_tokens: 0 is below 1"),
        ([5] * 161, 5, "161 tokens exceed the artifact's max_length of 160"),
        ([4096], 5, "token 4096 is outside the vocabulary"),
    ):
        with pytest.raises(GsrqError, match=message):
            Generation(model, tokenizer, prompt, max_new_tokens=count)
    for values, message in (
        ((-1.0,), "temperature: -1.0"),
        ((float("nan"),), "temperature: nan"),
        ((1.0, -2), "top_k: -2"),
        ((1.0, 0, 0.0), "top_p: 0.0"),
        ((1.0, 0, 1.0, -1), "seed: -1"),
    ):
        with pytest.raises(GsrqError, match=message):
            Sampling(*values)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="build the artifact again"):
        load_tokenizer(tmp_path)
    assert load_eos(tmp_path) == frozenset()
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load_eos(tmp_path) == {3, 4}
    (tmp_path / "tokenizer" / "generation_config.json").write_text("[")
    with pytest.raises(ArtifactError, match=r"generation_config\.json is not a JSON object"):
        load_eos(tmp_path)


def test_sampling_follows_the_distribution() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.3, 0.05], np.float32))

    def shares(sampling: Sampling) -> np.ndarray:
        return np.bincount([sampling.choose(logits, rng) for _ in range(4000)], minlength=5) / 4000

    assert Sampling().choose(logits, rng) == 1
    np.testing.assert_allclose(shares(Sampling(1.0)), [0.1, 0.5, 0.05, 0.3, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=2)), [0, 0.625, 0, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.81)), [1 / 9, 5 / 9, 0, 3 / 9, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.01)), [0, 1, 0, 0, 0])
    hot = np.sqrt(np.array([0.1, 0.5, 0.05, 0.3, 0.05]))
    np.testing.assert_allclose(shares(Sampling(2.0)), hot / hot.sum(), atol=0.03)
    assert shares(Sampling(1e-3))[1] == 1.0
    assert Sampling(0.5).choose(np.array([-np.inf, 3e4, -np.inf], np.float32), rng) == 1


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(max_size=6), text=st.text(min_size=1, max_size=30))
def test_pieces_join_to_the_text(prompt: str, text: str) -> None:
    _, tokenizer = demo()
    before, ids = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, text))
    stream = Detokenizer(tokenizer, before)
    pieces = [stream.add(token) for token in ids]
    tail = stream.finish()
    assert "".join(pieces) + tail == text.rstrip("\ufffd") or "\ufffd" in text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_broken_bytes_neither_stall_nor_show() -> None:
    _, tokenizer = demo()
    whole = tokenizer.encode("日本語", add_special_tokens=False)
    stream = Detokenizer(tokenizer)
    assert "".join(stream.add(token) for token in whole[:-1]) + stream.finish() == "日本"
    # A lead byte again and again never makes a character; later text must still come out.
    stream = Detokenizer(tokenizer)
    lead, after = whole[0], tokenizer.encode(" and so on", add_special_tokens=False)
    pieces = [stream.add(token) for token in [lead] * 30 + after]
    assert "".join(pieces).endswith("and so on")

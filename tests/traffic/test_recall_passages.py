"""The recall task: exact lengths, text as defined, and a trained model that can do it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from demo import demo_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from gsrq_export.errors import GsrqError
from gsrq_export.traffic.recall_passages import WORDS, Fact, draw_facts, make_case, plant

FACT = re.compile(r"\nThe secret code of (\w+-\w+) is (\d \d \d \d \d)\.\n")
ASKED = re.compile(r"\nQuestion: what is the secret code of (\w+-\w+)\? Answer:(?: (\d \d \d \d \d)\.\n)?")


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_directory())


def filler(tokenizer: Any, tokens: int) -> list[int]:
    """Plain prose without digits."""
    text = "The rain had stopped before noon, and the road to the village lay empty under a pale sky. " * (tokens // 15)
    return list(tokenizer.encode(text, add_special_tokens=False))[:tokens]


def test_words_and_facts() -> None:
    assert len(set(WORDS)) == 48
    facts = draw_facts(np.random.default_rng(0), 500)
    assert len({f.name for f in facts}) == 500
    for fact in facts:
        first, second = fact.name.split("-")
        assert first != second
        assert {first, second} <= set(WORDS)
    assert Fact("a-b", "1 2 3 4 5").answered == "\nQuestion: what is the secret code of a-b? Answer: 1 2 3 4 5.\n"


@pytest.mark.parametrize(("length", "facts"), [(301, 4), (999, 4), (97, 1), (500, 9)])
def test_cases(demo_tokenizer: Any, length: int, facts: int) -> None:
    haystack = filler(demo_tokenizer, 1500)
    for seed in range(5):
        case = make_case(np.random.default_rng(seed), haystack, demo_tokenizer, length, facts=facts)
        assert len(case.prompt) + len(case.answer) == length
        text = demo_tokenizer.decode(case.prompt)
        assert text.endswith(case.fact.question)
        found = FACT.findall(text)
        assert len(found) == facts
        assert (case.fact.name, case.fact.value) in found
        assert demo_tokenizer.decode(case.answer) == case.fact.answer
        again = make_case(np.random.default_rng(seed), haystack, demo_tokenizer, length, facts=facts)
        assert np.array_equal(case.prompt, again.prompt)


def test_depth(demo_tokenizer: Any) -> None:
    haystack = filler(demo_tokenizer, 900)
    for depth in (0.0, 0.5, 1.0):
        case = make_case(np.random.default_rng(1), haystack, demo_tokenizer, 600, depth, facts=1)
        before = demo_tokenizer.decode(case.prompt).index("\nThe secret code")
        assert case.depth == depth
        assert before / (len(demo_tokenizer.decode(case.prompt)) - 110) == pytest.approx(depth, abs=0.03)


def test_impossible_cases(demo_tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(GsrqError, match=r"recall length 60: 4 facts and a question take 1\d\d tokens"):
        make_case(rng, filler(demo_tokenizer, 500), demo_tokenizer, 60)
    with pytest.raises(GsrqError, match=r"needs \d+ tokens of text, the haystack has 50"):
        make_case(rng, filler(demo_tokenizer, 50), demo_tokenizer, 600)
    with pytest.raises(GsrqError, match="depth 2"):
        make_case(rng, [], demo_tokenizer, 600, depth=2)


@pytest.mark.parametrize(("length", "facts"), [(110, 1), (333, 3), (1024, 4)])
def test_planting_keeps_the_length_and_answers_every_fact_later(demo_tokenizer: Any, length: int, facts: int) -> None:
    sequence = filler(demo_tokenizer, length)
    for seed in range(8):
        planted = plant(np.random.default_rng(seed), sequence, demo_tokenizer)
        assert len(planted) == length
        text = demo_tokenizer.decode(planted)
        told = {m[1]: (m[2], m.start()) for m in FACT.finditer(text)}
        asked = {m[1]: (m[2], m.start()) for m in ASKED.finditer(text)}
        assert len(told) == len(asked) == facts
        for name, (value, at) in asked.items():
            assert told[name][0] == value
            assert told[name][1] < at
    with pytest.raises(GsrqError, match="no room for a recall passage"):
        plant(np.random.default_rng(0), sequence[:90], demo_tokenizer)


def test_the_trained_model_recalls(demo_tokenizer: Any) -> None:
    """The forms are those it was trained on: any other wording would give far less than this."""
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    cases = [make_case(rng, filler(demo_tokenizer, 700), demo_tokenizer, 400) for _ in range(16)]
    hits = 0
    for case in cases:
        with torch.no_grad():
            logits = model(torch.from_numpy(np.concatenate([case.prompt, case.answer]))[None]).logits[0]
        greedy = logits[len(case.prompt) - 1 : -1].argmax(-1).numpy()
        hits += bool(np.array_equal(greedy, case.answer))
    assert hits >= 12

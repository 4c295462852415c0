"""Long-context tasks: cases follow their definitions; scores tell a model that sees all from one that cannot."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from demo import demo, demo_text
from families import tiny_model
from small_codes import with_start_token
from traffic.byte_tokenizer import byte_tokenizer

from gsrq_export import GsrqError
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.evaluate.tasks import variable_tracing
from gsrq_export.evaluate.tasks.base import found_share
from gsrq_export.evaluate.tasks.common_words import COMMON, OFTEN, OTHERS
from gsrq_export.evaluate.tasks.measure import TASKS, TaskSettings, make_cases, run_tasks
from gsrq_export.evaluate.tasks.multi_key import LEAST
from gsrq_export.evaluate.tasks.multi_query import ASKED, FACTS
from gsrq_export.evaluate.tasks.multi_value import OTHERS as OTHER_NAMES
from gsrq_export.evaluate.tasks.multi_value import VALUES
from gsrq_export.evaluate.tasks.names import TaskName
from gsrq_export.evaluate.torch_runner import TorchRunner

FACT = re.compile(r"\nThe secret code of ([a-z]+-[a-z]+) is ((?:\d ){4}\d)\.\n")
QUESTION = re.compile(r"\nQuestion: what is the secret code of ([a-z]+-[a-z]+)\? Answer:")


def tokens() -> tuple[list[int], Any]:
    _, tokenizer = demo()
    return tokenizer.encode(demo_text(), add_special_tokens=False), tokenizer


def prompts(name: TaskName, length: int, cases: int = 6) -> list[tuple[list[str], list[tuple[str, ...]]]]:
    """Each case's turns as text, and their answers."""
    ids, tokenizer = tokens()
    made = make_cases(name, ids, tokenizer, length, cases, 0)
    assert {len(case[-1].prompt) + case[-1].new_tokens for case in made} == {length}
    return [([tokenizer.decode(turn.prompt) for turn in case], [turn.answers for turn in case]) for case in made]


def test_the_names_are_those_of_the_tasks() -> None:
    assert tuple(TASKS) == get_args(TaskName)


def test_multi_key_plants_more_keys_in_longer_contexts() -> None:
    counts = []
    for length in (300, 1200):
        for (text,), ((answer,),) in prompts("multi-key", length):
            facts = dict(FACT.findall(text))
            asked = QUESTION.findall(text)
            assert len(asked) == 1
            assert text.endswith(f"{asked[0]}? Answer:")
            assert facts[asked[0]] == answer
            counts.append(len(facts))
    assert set(counts[:6]) == {LEAST}
    assert min(counts[6:]) > 2 * LEAST


def test_multi_query_asks_in_turn_with_true_answers_before() -> None:
    for texts, answers in prompts("multi-query", 700):
        assert len(texts) == ASKED
        facts = dict(FACT.findall(texts[-1]))
        assert len(facts) >= FACTS
        names = QUESTION.findall(texts[-1])
        assert len(set(names)) == ASKED
        for turn, (text, (answer,)) in enumerate(zip(texts, answers, strict=True)):
            assert QUESTION.findall(text) == names[: turn + 1]
            assert text.endswith("Answer:")
            assert facts[names[turn]] == answer
            for name in names[:turn]:
                assert f"code of {name}? Answer: {facts[name]}.\n" in text


def test_multi_value_asks_for_all_codes_of_one_name() -> None:
    for (text,), (answers,) in prompts("multi-value", 500):
        facts = FACT.findall(text)
        assert len(facts) >= VALUES + OTHER_NAMES  # the sampled text may hold facts of its own
        name = re.search(rf"what are the {VALUES} secret codes of ([a-z-]+)\? Answer:$", text)
        assert name is not None
        assert {value for key, value in facts if key == name[1]} == set(answers)
        assert len(answers) == VALUES


def test_variable_tracing_chains_resolve_to_the_asked_value() -> None:
    for (text,), (answers,) in prompts("variable-tracing", 500):
        example, rest = text.split("hold the value", 1)
        held: dict[str, str] = {}
        for chunk in (example, rest):
            for name, source in re.findall(r"\nSet ([a-z]+) = (\w+)\.\n", chunk):
                assert name not in held
                held[name] = held.get(source, source)  # in the order of the text: a source stands before its use
        asked = re.search(r"which \d names hold the value (\d+)\? Answer:$", text)
        assert asked is not None
        assert {name for name, value in held.items() if value == asked[1]} == set(answers)
        assert all(value.isdigit() for value in held.values())
        assert len(set(held.values())) == 1 + variable_tracing.CHAINS


def test_common_words_come_ten_times_as_often() -> None:
    for (text,), (answers,) in prompts("common-words", 1000):
        listed = re.search(r"\nA list of words: (.*)\.\n\nQuestion: ", text)
        assert listed is not None
        counts = Counter(listed[1].split(", "))
        assert len(counts) == COMMON + OTHERS
        top = counts.most_common()
        assert {word for word, _ in top[:COMMON]} == set(answers)
        assert {count for _, count in top[:COMMON]} == {OFTEN * top[-1][1]}
        assert {count for _, count in top[COMMON:]} == {top[-1][1]}


def test_depths_cover_the_context() -> None:
    ids, tokenizer = tokens()
    depths = []
    for (turn,) in make_cases("multi-key", ids, tokenizer, 400, 40, 1):
        text = tokenizer.decode(turn.prompt)
        (asked,) = QUESTION.findall(text)
        depths.append(text.index(f"code of {asked} is") / len(text))
    assert np.histogram(depths, 4, (0, 1))[0].min() >= 3


def test_cases_depend_on_task_length_index_and_seed_alone() -> None:
    ids, tokenizer = tokens()
    for name in TASKS:
        five = make_cases(name, ids, tokenizer, 700, 5, 3)
        assert make_cases(name, ids, tokenizer, 700, 3, 3) == five[:3]
        assert make_cases(name, ids, tokenizer, 700, 5, 4) != five
        assert len({str(case) for case in five}) == 5


def test_a_byte_tokenizer_with_a_start_token() -> None:
    tokenizer = with_start_token(byte_tokenizer())
    ids = tokenizer.encode(demo_text(), add_special_tokens=False)
    for name in TASKS:
        (case,) = make_cases(name, ids, tokenizer, 1800, 1, 0)
        assert len(case[-1].prompt) + case[-1].new_tokens == 1800
        assert all(turn.prompt[0] == 0 and turn.prompt.count(0) == 1 for turn in case)


def test_found_share_counts_whole_words() -> None:
    assert found_share(("1 2 3", "4 5 6"), " 1 2 3, then 7") == 0.5
    assert found_share(("plum",), "plums and aplum") == 0
    assert found_share(("plum", "wren"), "Wren; PLUM.") == 1


class Forgetful(TorchRunner):
    """The real model, but it sees only the last 40 tokens of a prompt."""

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **more: Any) -> list[list[int]]:
        return super().greedy([prompt[-40:] for prompt in prompts], max_new_tokens, **more)


def test_the_demo_model_does_what_it_was_trained_for() -> None:
    model, tokenizer = demo()
    ids, _ = tokens()
    settings = TaskSettings(("multi-key", "multi-query"), (300,), cases=4)
    done: list[int] = []
    exact = run_tasks(TorchRunner(model), tokenizer, ids, settings, batch=3, progress=done.append)
    assert sum(done) == settings.steps == 8
    json.dumps(exact, allow_nan=False)
    assert [(row["task"], row["tokens"], row["cases"]) for row in exact] == [
        ("multi-key", 300, 4),
        ("multi-query", 300, 4),
    ]
    for row in exact:
        assert row["score"] == np.mean(row["case_scores"]) >= 0.6
        assert row["interval"] == list(bootstrap_mean(np.array(row["case_scores"]), 0))
    assert set(np.array(exact[1]["case_scores"]) * ASKED) <= {0, 1, 2, 3, 4}
    blind = run_tasks(Forgetful(model), tokenizer, ids, settings)
    assert all(row["score"] <= 0.2 for row in blind)
    assert run_tasks(TorchRunner(model), tokenizer, ids, settings, batch=4) == exact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (4096,)}, r"evaluation\.tasks\.lengths: 4096 exceeds the model's 2048 tokens"),
        ({"lengths": (60,)}, r"task multi-key at length 60: the task's passages need \d+ tokens more"),
        ({"lengths": (2000,)}, r"the task needs \d+ tokens of text, the haystack has 700"),
        ({"names": ("common-words",)}, r"task common-words at length 400: common-words needs 55 different words"),
        ({"names": ("needle",)}, r"evaluation\.tasks\.names: 'needle' is no task"),
        ({"cases": 0}, r"evaluation\.tasks\.cases: 0 measures nothing"),
        ({"cases": -1}, r"evaluation\.tasks\.cases: -1 measures nothing"),
        ({"lengths": ()}, r"evaluation\.tasks\.lengths: \(\) measures nothing"),
    ],
)
def test_refusals_before_anything_runs(changes: dict[str, Any], message: str) -> None:
    model, tokenizer = demo()
    ids, _ = tokens()

    class Untouched(TorchRunner):
        def greedy(self, *arguments: Any, **more: Any) -> list[list[int]]:
            raise AssertionError("ran")

    fields: dict[str, Any] = {"names": ("multi-key",), "lengths": (400,), "cases": 2, **changes}
    few = ids[:40] if fields["names"] == ("common-words",) else ids[:700]
    with pytest.raises(GsrqError, match=message):
        run_tasks(Untouched(model), tokenizer, few, TaskSettings(**fields))


def test_a_model_of_another_vocabulary_is_not_scored() -> None:
    ids, tokenizer = tokens()
    with pytest.raises(GsrqError, match="outside the vocabulary"):
        run_tasks(TorchRunner(tiny_model("Llama")), tokenizer, ids, TaskSettings(("multi-key",), (400,), 1))

"""Scores of a runner on the tasks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, get_args

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.evaluate.tasks import common_words, multi_key, multi_query, multi_value, variable_tracing
from gsrq_export.evaluate.tasks.base import CaseMaker, Turn, found_share
from gsrq_export.evaluate.tasks.names import TaskName
from gsrq_export.traffic.recall_passages import Ids

TASKS: dict[TaskName, CaseMaker] = {
    "multi-key": multi_key.make_case,
    "multi-value": multi_value.make_case,
    "multi-query": multi_query.make_case,
    "variable-tracing": variable_tracing.make_case,
    "common-words": common_words.make_case,
}


@dataclass(frozen=True)
class TaskSettings:
    """``lengths`` are contexts in tokens, prompt and answer together; ``cases`` are those of one task and length."""

    names: tuple[TaskName, ...]
    lengths: tuple[int, ...]
    cases: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value or (field.name == "cases" and value < 1):
                raise GsrqError(f"evaluation.tasks.{field.name}: {value} measures nothing", "give at least one")
        for name in self.names:
            if name not in TASKS:
                raise GsrqError(f"evaluation.tasks.names: {name!r} is no task", f"use {', '.join(get_args(TaskName))}")

    @property
    def steps(self) -> int:
        return len(self.names) * len(self.lengths) * self.cases


class TaskScore(TypedDict):
    """``score`` is the mean of ``case_scores``, 0 .. 1, in the cases' order; ``interval`` its 95 % bootstrap
    interval over cases.
    """

    task: str
    tokens: int
    score: float
    interval: list[float]
    cases: int
    case_scores: list[float]


def make_cases(
    name: TaskName, haystack: Sequence[int], tokenizer: Any, length: int, cases: int, seed: int
) -> list[list[Turn]]:
    """The cases of one task and length. They depend on nothing else, so two runners get the same ones.

    Raises:
        GsrqError: the length has no room for the task, or the haystack is too short.
    """
    text: Ids = np.asarray(haystack, dtype=np.int64)
    key = zlib.crc32(name.encode())
    try:
        return [
            TASKS[name](np.random.default_rng([seed, length, i, key]), text, tokenizer, length) for i in range(cases)
        ]
    except GsrqError as error:
        raise GsrqError(f"task {name} at length {length}: {error.problem}", error.mend) from None


def run_tasks(
    runner: Runner,
    tokenizer: Any,
    haystack: Sequence[int],
    settings: TaskSettings,
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[TaskScore]:
    """Scores of greedy answers: of each case the share of the expected answers that its text holds.

    Args:
        haystack: tokens of held-out text.
        batch: cases at once.
        progress: called with the cases done since the last call.
    Raises:
        GsrqError: a length exceeds the model's, or as `make_cases`; before anything runs.
    """
    check_tasks(runner, tokenizer, haystack, settings, seed)
    table = []
    for name in settings.names:
        for length in settings.lengths:
            drawn = make_cases(name, haystack, tokenizer, length, settings.cases, seed)
            scores: list[float] = []
            for start in range(0, len(drawn), batch):
                part = drawn[start : start + batch]
                scores += _score(runner, tokenizer, part)
                if progress:
                    progress(len(part))
            values = np.array(scores)
            table.append(
                TaskScore(
                    task=name,
                    tokens=length,
                    score=float(values.mean()),
                    interval=list(bootstrap_mean(values, seed)),
                    cases=len(scores),
                    case_scores=scores,
                )
            )
    return table


def check_tasks(runner: Runner, tokenizer: Any, haystack: Sequence[int], settings: TaskSettings, seed: int = 0) -> None:
    """Refuse what `run_tasks` would."""
    for length in settings.lengths:
        if length > runner.max_length:
            raise GsrqError(
                f"evaluation.tasks.lengths: {length} exceeds the model's {runner.max_length} tokens",
                f"use lengths of at most {runner.max_length}",
            )
        for name in settings.names:
            make_cases(name, haystack, tokenizer, length, 1, seed)


def _score(runner: Runner, tokenizer: Any, cases: Sequence[Sequence[Turn]]) -> list[float]:
    """Each case's mean over its turns' answers; all cases of a task have as many turns."""
    shares = []
    for turns in zip(*cases, strict=True):
        answers = runner.greedy([turn.prompt for turn in turns], max(turn.new_tokens for turn in turns))
        texts = [
            tokenizer.decode(answer[: turn.new_tokens], skip_special_tokens=True)
            for answer, turn in zip(answers, turns, strict=True)
        ]
        shares.append([found_share(turn.answers, text) for turn, text in zip(turns, texts, strict=True)])
    return [float(np.mean(case)) for case in zip(*shares, strict=True)]

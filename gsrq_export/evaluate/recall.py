"""Exact-match recall of facts planted in held-out text, by context length and by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.stats import wilson
from gsrq_export.traffic.recall_passages import RecallCase, make_case

FACTS = 4  # planted in a case; one is asked for
DEPTHS = ("first third", "middle third", "last third")


class Rate(TypedDict):
    """``rate`` is None where there were no cases; ``interval`` is the 95 % Wilson interval."""

    rate: float | None
    correct: int
    cases: int
    interval: list[float] | None


class LengthRecall(Rate):
    """``tokens`` counts prompt and answer; the depths are thirds of the haystack, the start first; ``hits`` has
    each case's result, in the order of ``make_cases``, for paired comparisons.
    """

    tokens: int
    hits: list[bool]
    by_depth: dict[str, Rate]


class RecallMetrics(TypedDict):
    facts: int
    lengths: list[LengthRecall]


def make_cases(haystack: Sequence[int], tokenizer: Any, length: int, cases: int, seed: int) -> list[RecallCase]:
    """The cases of one length. They depend on nothing else, so two runners get the same ones."""
    text = np.asarray(haystack, dtype=np.int64)
    return [
        make_case(np.random.default_rng([seed, length, i]), text, tokenizer, length, facts=FACTS) for i in range(cases)
    ]


def check_lengths(lengths: Sequence[int], max_length: int) -> None:
    """Refuse context lengths that the model does not have."""
    for length in lengths:
        if length > max_length:
            raise GsrqError(
                f"recall length {length} exceeds the model's {max_length} tokens",
                f"use lengths of at most {max_length}",
            )


def recall(
    runner: Runner,
    tokenizer: Any,
    haystack: Sequence[int],
    *,
    lengths: Sequence[int],
    cases: int,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> RecallMetrics:
    """Greedy exact match of the whole answer.

    Args:
        haystack: tokens of held-out text.
        lengths: context lengths in tokens, prompt and answer together.
        cases: cases a length.
        batch: cases decoded at once.
        progress: called with the cases done since the last call.
    Raises:
        GsrqError: a length exceeds the model's, or the haystack is too short.
    """
    check_lengths(lengths, runner.max_length)
    drawn = [make_cases(haystack, tokenizer, length, cases, seed) for length in lengths]
    table = []
    for length, of_length in zip(lengths, drawn, strict=True):
        hits: list[bool] = []
        for start in range(0, cases, batch):
            part = of_length[start : start + batch]
            hits += _answer(runner, part)
            if progress:
                progress(len(part))
        thirds = [min(2, int(case.depth * 3)) for case in of_length]
        by_depth = {
            name: _rate([hit for hit, third in zip(hits, thirds, strict=True) if third == i])
            for i, name in enumerate(DEPTHS)
        }
        table.append(LengthRecall(tokens=length, hits=hits, by_depth=by_depth, **_rate(hits)))
    return RecallMetrics(facts=FACTS, lengths=table)


def _answer(runner: Runner, cases: Sequence[RecallCase]) -> list[bool]:
    # Answers may differ in length by a token: decode the longest, compare each on its own.
    answers = runner.greedy([case.prompt.tolist() for case in cases], max(len(case.answer) for case in cases))
    return [got[: len(case.answer)] == case.answer.tolist() for got, case in zip(answers, cases, strict=True)]


def _rate(hits: Sequence[bool]) -> Rate:
    if not hits:
        return Rate(rate=None, correct=0, cases=0, interval=None)
    return Rate(
        rate=sum(hits) / len(hits), correct=sum(hits), cases=len(hits), interval=list(wilson(sum(hits), len(hits)))
    )

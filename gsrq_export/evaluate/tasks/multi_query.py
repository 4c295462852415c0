"""Eight facts of the recall task's form, four asked one after the other; earlier questions stand there answered."""

from __future__ import annotations

from typing import Any

import numpy as np

from gsrq_export.evaluate.tasks.base import Turn, ask, lay_out
from gsrq_export.traffic.recall_passages import Ids, draw_facts, encode

FACTS, ASKED = 8, 4


def make_case(rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
    drawn = draw_facts(rng, FACTS)
    asked = drawn[:ASKED]
    pairs = [ask(tokenizer, fact.question, fact.answer) for fact in asked]
    answered = [encode(tokenizer, fact.answered) for fact in asked[:-1]]
    size = length - sum(map(len, answered)) - sum(map(len, pairs[-1]))
    sentences = [encode(tokenizer, fact.sentence) for fact in drawn]
    context = lay_out(rng, haystack, tokenizer, size, [[sentence] for sentence in sentences]).tolist()
    turns = []
    for turn, (fact, (question, answer)) in enumerate(zip(asked, pairs, strict=True)):
        turns.append(Turn([*context, *question.tolist()], (fact.value,), len(answer)))
        if turn < len(answered):
            context = [*context, *answered[turn].tolist()]
    return turns

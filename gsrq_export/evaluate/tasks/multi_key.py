"""Many facts, one asked: a quarter of the context is facts of the recall task's form, so near misses abound."""

from __future__ import annotations

from typing import Any

import numpy as np

from gsrq_export.evaluate.tasks.base import Turn, ask, lay_out
from gsrq_export.traffic.recall_passages import Ids, draw_facts, encode

SHARE = 0.25  # of the context's tokens
LEAST, MOST = 4, 500  # facts


def make_case(rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
    drawn = draw_facts(rng, MOST)
    asked = drawn[0]
    sentences: list[Ids] = []
    taken = 0
    for fact in drawn:
        sentence = encode(tokenizer, fact.sentence)
        if len(sentences) >= LEAST and taken + len(sentence) > SHARE * length:
            break
        sentences.append(sentence)
        taken += len(sentence)
    question, answer = ask(tokenizer, asked.question, asked.answer)
    size = length - len(question) - len(answer)
    body = lay_out(rng, haystack, tokenizer, size, [[sentence] for sentence in sentences])
    return [Turn([*body.tolist(), *question.tolist()], (asked.value,), len(answer))]

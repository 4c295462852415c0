"""One name with four codes at different places, all asked; three other names distract."""

from __future__ import annotations

from typing import Any

import numpy as np

from gsrq_export.evaluate.tasks.base import Turn, lay_out
from gsrq_export.traffic.recall_passages import Fact, Ids, draw_facts, encode

VALUES, OTHERS = 4, 3
SPARE = 4  # tokens an answer beyond the plainest list, for other ways of writing it


def make_case(rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
    drawn = draw_facts(rng, VALUES + OTHERS)
    asked = drawn[0]
    facts = [Fact(asked.name, fact.value) for fact in drawn[:VALUES]] + drawn[VALUES:]
    values = tuple(dict.fromkeys(fact.value for fact in facts[:VALUES]))  # two may be equal, one time in 10^4
    question = encode(tokenizer, f"\nQuestion: what are the {len(values)} secret codes of {asked.name}? Answer:")
    new_tokens = len(encode(tokenizer, " " + ", ".join(values))) + SPARE * len(values)
    sentences = [[encode(tokenizer, fact.sentence)] for fact in facts]
    body = lay_out(rng, haystack, tokenizer, length - len(question) - new_tokens, sentences)
    return [Turn([*body.tolist(), *question.tolist()], values, new_tokens)]

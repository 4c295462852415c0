"""Aggregation: a long shuffled list of words, five of which come ten times as often as the others. Which?

The words are the held-out text's own; the list fills the context but for a rest of text in front of it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.tasks.base import Turn, lay_out
from gsrq_export.traffic.recall_passages import Ids, encode

COMMON, OTHERS = 5, 50
OFTEN = 10  # times as often
STRETCH = 8192  # tokens of text that words are taken from
SPARE = 3  # tokens an answer beyond the plainest list


def make_case(rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
    chosen = [str(word) for word in rng.permutation(_words(rng, haystack, tokenizer))[: COMMON + OTHERS]]
    common, others = chosen[:COMMON], chosen[COMMON:]
    question = encode(tokenizer, f"\nQuestion: which {COMMON} words are most frequent in the list? Answer:")
    new_tokens = len(encode(tokenizer, " " + ", ".join(common))) + SPARE * COMMON
    size = length - len(question) - new_tokens
    entries = [*(common * OFTEN), *others]
    # Whole rounds, so that every word keeps its share.
    rounds = max(1, size // len(encode(tokenizer, _written(entries))))
    shuffled = [str(word) for _ in range(rounds) for word in rng.permutation(entries)]
    listed = encode(tokenizer, _written(shuffled))
    while len(listed) + 1 > size and len(shuffled) > len(entries):  # 1: a start token
        shuffled = shuffled[: -len(entries)]
        listed = encode(tokenizer, _written(shuffled))
    text = lay_out(rng, haystack, tokenizer, size - len(listed), [])
    return [Turn([*text.tolist(), *listed.tolist(), *question.tolist()], tuple(common), new_tokens)]


def _written(entries: list[str]) -> str:
    return f"\nA list of words: {', '.join(entries)}.\n"


def _words(rng: np.random.Generator, haystack: Ids, tokenizer: Any) -> list[str]:
    first = int(rng.integers(0, max(0, len(haystack) - STRETCH) + 1))
    text = tokenizer.decode(haystack[first : first + STRETCH], skip_special_tokens=True)
    words = sorted(set(re.findall(r"\b[^\W\d_A-Z]{4,12}\b", text)))
    if len(words) < COMMON + OTHERS:
        raise GsrqError(
            f"common-words needs {COMMON + OTHERS} different words of 4 to 12 small letters, {STRETCH} tokens of the "
            f"text have {len(words)}",
            "give more held-out text, in a language that puts spaces between words, or leave the task out",
        )
    return words

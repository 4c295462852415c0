"""What a task is: a maker of cases. A case is one or more turns of prompt, expected answers and room for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.traffic.recall_passages import Ids, encode, splice
from gsrq_export.traffic.tokens import starts_with_bos

NOTHING: Ids = np.empty(0, np.int64)


@dataclass(frozen=True)
class Turn:
    """A prompt to be continued greedily.

    Attributes:
        prompt: token ids.
        answers: strings that the continuation should hold, in any order.
        new_tokens: tokens of the continuation.
    """

    prompt: list[int]
    answers: tuple[str, ...]
    new_tokens: int


class CaseMaker(Protocol):
    """One task. It draws everything from ``rng``, so that equal states give equal cases."""

    def __call__(self, rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
        """A case: its turns, each with the true answers to the earlier ones in its prompt.

        Args:
            haystack: token ids [n] of held-out text.
            length: tokens of the last turn's prompt and continuation together, exactly.
        Raises:
            GsrqError: the length has no room for the task, or the haystack is too short.
        """


def found_share(answers: Sequence[str], text: str) -> float:
    """The share of the answers that stand in the text as whole words, whatever their case."""
    hits = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None for answer in answers]
    return sum(hits) / len(hits)


def ask(tokenizer: Any, question: str, answer: str) -> tuple[Ids, Ids]:
    """Tokens of both, such that together they are how the tokenizer writes them joined, where it can be."""
    first, both = encode(tokenizer, question), encode(tokenizer, question + answer)
    if np.array_equal(both[: len(first)], first):
        return first, both[len(first) :]
    return first, encode(tokenizer, answer)  # a token spans the border: the best that a prompt can see


def lay_out(
    rng: np.random.Generator,
    haystack: Ids,
    tokenizer: Any,
    size: int,
    chains: Sequence[Sequence[Ids]],
    head: Ids = NOTHING,
) -> Ids:
    """``size`` tokens: the head, then a random stretch of the haystack with the passages at random depths.

    The tokenizer's start token, if it puts one before texts, comes first.

    Args:
        chains: passages; those of one chain keep their order, chains mix.
    Raises:
        GsrqError: no room, or too little text.
    """
    bos = starts_with_bos(tokenizer)
    start = head if bos is None else np.concatenate([[bos], head])
    room = size - len(start) - sum(len(passage) for chain in chains for passage in chain)
    if room < 0:
        raise GsrqError(f"the task's passages need {-room} tokens more", f"use lengths that are {-room} longer")
    if len(haystack) < room:
        raise GsrqError(
            f"the task needs {room} tokens of text, the haystack has {len(haystack)}",
            "give more held-out text or use shorter lengths",
        )
    first = int(rng.integers(0, len(haystack) - room + 1))
    items = []
    for chain in chains:
        places = sorted(rng.integers(0, room + 1, len(chain)).tolist())
        items += list(zip(places, chain, strict=True))
    return np.concatenate([start, splice(haystack[first : first + room], items)])

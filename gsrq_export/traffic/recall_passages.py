"""The recall task: facts planted in ordinary text, asked for later. Low-bit caches break on it first.

A fact is ``\\nThe secret code of amber-basil is 3 1 4 1 5.\\n``; a question, which the text itself answers, is
``\\nQuestion: what is the secret code of amber-basil? Answer: 3 1 4 1 5.\\n``. Names are two of 48 words
joined by a hyphen, values five digits separated by spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gsrq_export.errors import GsrqError

# fmt: off
WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fable", "glade", "hazel", "ivory", "jade", "koala", "lemon",
    "maple", "north", "olive", "pearl", "quill", "river", "sable", "tulip", "umber", "violet", "willow", "yarrow",
    "zephyr", "acorn", "birch", "coral", "dune", "eagle", "fern", "grove", "heron", "iris", "juniper", "kelp",
    "lotus", "moss", "nectar", "opal", "plum", "quartz", "raven", "sage", "thorn", "urchin", "vine", "wren",
)
# fmt: on
DIGITS = 5

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fact:
    """A name and its value, as written in the text."""

    name: str  # "amber-basil"
    value: str  # "3 1 4 1 5"

    @property
    def sentence(self) -> str:
        return f"\nThe secret code of {self.name} is {self.value}.\n"

    @property
    def question(self) -> str:
        return f"\nQuestion: what is the secret code of {self.name}? Answer:"

    @property
    def answer(self) -> str:
        return f" {self.value}"

    @property
    def answered(self) -> str:
        return f"{self.question}{self.answer}.\n"


@dataclass(frozen=True)
class RecallCase:
    """One test case.

    Attributes:
        prompt: int64 [length - len(answer)]; ends with the question.
        answer: int64; a case counts when greedy decoding gives exactly these tokens.
        fact: the fact that is asked for.
        depth: where its sentence stands: 0 at the start of the haystack, 1 just before the question.
    """

    prompt: Ids
    answer: Ids
    fact: Fact
    depth: float


def draw_facts(rng: np.random.Generator, count: int) -> list[Fact]:
    """Facts with distinct names, uniform over names and values."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        first, second = rng.choice(len(WORDS), size=2, replace=False)
        name = f"{WORDS[first]}-{WORDS[second]}"
        facts.setdefault(name, Fact(name, " ".join(str(d) for d in rng.integers(0, 10, DIGITS))))
    return list(facts.values())


def encode(tokenizer: Any, text: str) -> Ids:
    """Text to token ids without special tokens; int64 [n]."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)


def encode_answer(tokenizer: Any, fact: Fact) -> tuple[Ids, Ids]:
    """(question, answer) tokens such that their concatenation is how the tokenizer writes both together."""
    question, both = encode(tokenizer, fact.question), encode(tokenizer, fact.question + fact.answer)
    if np.array_equal(both[: len(question)], question):
        return question, both[len(question) :]
    return question, encode(tokenizer, fact.answer)  # tokens span the border: the best that a prompt can see


def make_case(
    rng: np.random.Generator,
    haystack: npt.ArrayLike,
    tokenizer: Any,
    length: int,
    depth: float | None = None,
    facts: int = 4,
) -> RecallCase:
    """A test case of exactly ``length`` tokens, the answer included.

    Args:
        haystack: token ids [n] of held-out text; a random stretch of it is used.
        length: tokens of prompt and answer together, so that a case fits a context of that length.
        depth: where the asked fact is planted, 0 .. 1; None draws it uniformly.
        facts: facts planted; the others at uniformly random depths.
    Raises:
        GsrqError: the length has no room for the passages, or the haystack is too short for it.
    """
    if facts < 1 or (depth is not None and not 0 <= depth <= 1):
        raise GsrqError(f"recall: need facts >= 1 and depth in 0 .. 1, not facts {facts}, depth {depth}")
    text = np.asarray(haystack, dtype=np.int64)
    drawn = draw_facts(rng, facts)
    asked = drawn[0]
    sentences = [encode(tokenizer, fact.sentence) for fact in drawn]
    question, answer = encode_answer(tokenizer, asked)
    planted = sum(map(len, sentences))
    room = length - planted - len(question) - len(answer)
    if room < 0:
        raise GsrqError(
            f"recall length {length}: {facts} facts and a question take {length - room} tokens",
            f"use a length of at least {length - room}, or fewer facts",
        )
    if len(text) < room:
        raise GsrqError(
            f"recall length {length} needs {room} tokens of text, the haystack has {len(text)}",
            "give more text or ask for shorter cases",
        )
    start = int(rng.integers(0, len(text) - room + 1))
    depths = rng.random(facts)
    if depth is not None:
        depths[0] = depth
    places = [round(float(d) * room) for d in depths]
    body = splice(text[start : start + room], list(zip(places, sentences, strict=True)))
    return RecallCase(np.concatenate([body, question]), answer, asked, float(depths[0]))


def plant(rng: np.random.Generator, sequence: npt.ArrayLike, tokenizer: Any, facts: int = 4) -> Ids:
    """Calibration traffic: plant facts, each answered once anywhere later, keeping the sequence's length.

    Args:
        sequence: token ids [n]; its tail makes room.
        facts: facts to plant; fewer where the passages would take over half of the sequence.
    Raises:
        GsrqError: not one fact and its question fit.
    """
    text = np.asarray(sequence, dtype=np.int64)
    passages: list[tuple[Ids, Ids]] = []
    planted = 0
    for fact in draw_facts(rng, facts):
        pair = encode(tokenizer, fact.sentence), encode(tokenizer, fact.answered)
        size = len(pair[0]) + len(pair[1])
        if 2 * (planted + size) <= len(text):
            passages.append(pair)
            planted += size
    if not passages:
        raise GsrqError(
            f"sequences of {len(text)} tokens have no room for a recall passage",
            "raise traffic.sequence_length or set traffic.recall_share to 0",
        )
    room = len(text) - planted
    items: list[tuple[int, Ids]] = []
    for sentence, answered in passages:
        place = int(rng.integers(0, room + 1))
        items += [(place, sentence), (int(rng.integers(place, room + 1)), answered)]
    return splice(text[:room], items)


def splice(text: Ids, items: Sequence[tuple[int, Ids]]) -> Ids:
    """Insert token runs before the given positions of the text; equal positions keep the order given."""
    parts: list[Ids] = []
    done = 0
    for place, tokens in sorted(items, key=lambda item: item[0]):
        parts += [text[done:place], tokens]
        done = place
    return np.concatenate([*parts, text[done:]])

"""Chains of assignments: which names come to hold a value? Another chain distracts, a worked example comes first."""

from __future__ import annotations

from typing import Any

import numpy as np

from gsrq_export.evaluate.tasks.base import Turn, lay_out
from gsrq_export.traffic.recall_passages import WORDS, Ids, encode

CHAINS, LINKS = 2, 4  # names in a chain
EXAMPLE_LINKS = 3
SPARE = 3  # tokens a name beyond the plainest list


def make_case(rng: np.random.Generator, haystack: Ids, tokenizer: Any, length: int) -> list[Turn]:
    names = [WORDS[i] for i in rng.permutation(len(WORDS))[: EXAMPLE_LINKS + CHAINS * LINKS]]
    values = [str(v) for v in rng.choice(np.arange(10_000, 100_000), 1 + CHAINS, replace=False)]
    shown, names = names[:EXAMPLE_LINKS], names[EXAMPLE_LINKS:]
    example = "".join([*_lines(shown, values[0]), _question(values[0], len(shown)), f" {', '.join(shown)}.\n"])
    chains = [names[i * LINKS : (i + 1) * LINKS] for i in range(CHAINS)]
    asked, value = chains[0], values[1]
    passages = [
        [encode(tokenizer, line) for line in _lines(chain, start)]
        for chain, start in zip(chains, values[1:], strict=True)
    ]
    question = encode(tokenizer, _question(value, LINKS))
    new_tokens = len(encode(tokenizer, " " + ", ".join(asked))) + SPARE * LINKS
    size = length - len(question) - new_tokens
    body = lay_out(rng, haystack, tokenizer, size, passages, head=encode(tokenizer, example))
    return [Turn([*body.tolist(), *question.tolist()], tuple(asked), new_tokens)]


def _lines(names: list[str], value: str) -> list[str]:
    sources = [value, *names[:-1]]
    return [f"\nSet {name} = {source}.\n" for name, source in zip(names, sources, strict=True)]


def _question(value: str, count: int) -> str:
    return f"\nQuestion: which {count} names hold the value {value}? Answer:"

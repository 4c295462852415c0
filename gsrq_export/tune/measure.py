"""The loss: how far the coded model's next-token distributions are from the exact model's, on held-out traffic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.cache.rule import CacheRule
from gsrq_export.capture import KINDS, attend
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.finetune import CodedModel, key_coder
from gsrq_export.codec.int8 import snap_side
from gsrq_export.model.intercept import intercept
from gsrq_export.model.introspect import ModelSpec
from gsrq_export.tune.budget import Place

KEPT_BYTES = 1 << 30  # of the exact model's log-probabilities; more are computed anew each time
# Tokens decode one by one, and some tokenizers then drop spaces.
ANSWER = re.compile(r"Question:\s*what\s*is\s*the\s*secret\s*code\s*of\s*[a-z]+-[a-z]+\s*\?\s*Answer:((?:\s*\d){5})")


@dataclass(frozen=True)
class Divergence:
    """KL(model || coded model) in nats a token.

    Attributes:
        kl: mean over all tokens.
        answer_kl: mean over the tokens that predict answers of recall passages; None where there are none.
    """

    kl: float
    answer_kl: float | None

    @property
    def loss(self) -> float:
        """What is minimised: all tokens, and answers, which are few and are what a coded cache loses first, alike."""
        return self.kl if self.answer_kl is None else (self.kl + self.answer_kl) / 2


def answer_tokens(ids: np.ndarray[Any, np.dtype[np.int64]], tokenizer: Any) -> torch.Tensor:
    """Where the next token is part of an answer of a recall passage: bool [N, T]."""
    found = np.zeros(ids.shape, bool)
    pieces = {int(token): tokenizer.decode([int(token)]) for token in np.unique(ids)}
    for row, sequence in enumerate(ids):
        ends = np.cumsum([len(pieces[int(token)]) for token in sequence])
        text = "".join(pieces[int(token)] for token in sequence)
        for match in ANSWER.finditer(text):
            first, last = np.searchsorted(ends, [match.start(1), match.end(1) - 1], side="right")
            found[row, max(0, first - 1) : last] = True
    return torch.from_numpy(found)


class Meter:
    """Measures codebooks on the same rows every time.

    Args:
        model: float32, frozen.
        ids: int64 [N, T].
        answers: bool [N, T], see ``answer_tokens``.
        beam: of encoding.
        int8: whether codewords are snapped as a recipe with ``codewords: int8`` has them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: ModelSpec,
        ids: torch.Tensor,
        answers: torch.Tensor,
        beam: int = 1,
        int8: bool = False,
    ) -> None:
        self.model, self.spec, self.ids, self.answers, self.beam = model, spec, ids, answers, beam
        self.int8 = int8
        self.device = next(model.parameters()).device
        self._exact: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self, books: Mapping[Place, Codebook], rule: CacheRule) -> Divergence:
        """The divergence with these places coded under the rule and all others exact."""
        if self.int8:
            books = {place: snap_side(book, place[1]) for place, book in books.items()}
        here = {place: book.to(self.device) for place, book in books.items()}
        coders = {
            place: key_coder(
                ResidualCodec(book, self.beam).reconstruct_heads, book, self.spec, self.spec.layers[place[0]]
            )
            for place, book in here.items()
        }
        pairs = [
            (coders.get((layer.index, KINDS[0])), coders.get((layer.index, KINDS[1]))) for layer in self.spec.layers
        ]
        student = CodedModel(self.spec, pairs, rule)
        rows = []
        for i in range(len(self.ids)):
            with intercept(self.model, student):
                found = self._log_probabilities(i)
            exact = self._target(i)
            rows.append((exact.exp() * (exact - found)).sum(-1).cpu())
        kl = torch.stack(rows).double()
        answered = kl[self.answers]
        return Divergence(float(kl.mean()), float(answered.mean()) if len(answered) else None)

    def _target(self, row: int) -> torch.Tensor:
        if row in self._exact:
            return self._exact[row]
        with intercept(self.model, lambda call: attend(call, self.spec)):
            found = self._log_probabilities(row)
        if found.numel() * 4 * len(self.ids) <= KEPT_BYTES:
            self._exact[row] = found
        return found

    def _log_probabilities(self, row: int) -> torch.Tensor:
        """float32 [T, vocab]."""
        logits: torch.Tensor = self.model(input_ids=self.ids[row : row + 1].to(self.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

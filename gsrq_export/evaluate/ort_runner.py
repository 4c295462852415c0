"""Runs an evaluation on an exported artifact through ONNX Runtime: what is measured is what is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gsrq_export.evaluate.runner import LOGITS_BYTES, Runner, Until, check_ids, check_prompts, continue_greedily
from gsrq_export.runtime.session import PREFILL_CHUNK, OrtModel


class OrtRunner(Runner):
    def __init__(self, model: OrtModel) -> None:
        self._model = model

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_length(self) -> int:
        return self._model.max_length

    def logits(self, ids: torch.Tensor, start: int = 1) -> Iterator[torch.Tensor]:
        check_ids(ids, start, self.vocab_size, self.max_length)
        batch, length = ids.shape
        rows = ids.tolist()
        bounded = max(1, LOGITS_BYTES // (4 * self.vocab_size * batch))
        steps = 1 if self._model.metadata.exact_prefill else min(PREFILL_CHUNK, bounded)
        try:
            yield torch.from_numpy(self._model.prefill([row[:start] for row in rows]))[:, None]
            for t in range(start, length - 1, steps):
                stop = min(t + steps, length - 1)
                yield torch.from_numpy(self._model.append([row[t:stop] for row in rows]))
        finally:
            self._model.reset()

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Until = None) -> list[list[int]]:
        check_prompts(prompts, max_new_tokens, self.vocab_size, self.max_length)

        def step(tokens: list[int]) -> list[int]:
            return self._model.step(tokens).argmax(-1).tolist()  # type: ignore[no-any-return]

        first = self._model.prefill(prompts).argmax(-1).tolist()
        answers = continue_greedily(first, step, max_new_tokens, until)
        self._model.reset()
        return answers

"""Runs an evaluation on an exported artifact through ONNX Runtime: what is measured is what is deployed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gsrq_export.evaluate.runner import LOGITS_BYTES, check_ids, check_prompts, token_nll
from gsrq_export.runtime.session import PREFILL_CHUNK, OrtModel


class OrtRunner:
    def __init__(self, model: OrtModel) -> None:
        self._model = model

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_length(self) -> int:
        return self._model.max_length

    def nll(self, ids: torch.Tensor, start: int = 1) -> torch.Tensor:
        check_ids(ids, start, self.vocab_size, self.max_length)
        batch, length = ids.shape
        rows = ids.tolist()
        bounded = max(1, LOGITS_BYTES // (4 * self.vocab_size * batch))
        steps = 1 if self._model.metadata.exact_prefill else min(PREFILL_CHUNK, bounded)
        logits = self._model.prefill([row[:start] for row in rows])
        parts = [token_nll(torch.from_numpy(logits), ids[:, start])[:, None]]
        for t in range(start, length - 1, steps):
            stop = min(t + steps, length - 1)
            out = self._model.append([row[t:stop] for row in rows])
            parts.append(token_nll(torch.from_numpy(out), ids[:, t + 1 : stop + 1]))
        self._model.reset()
        return torch.cat(parts, 1)

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        check_prompts(prompts, max_new_tokens, self.vocab_size, self.max_length)
        chosen = [self._model.prefill(prompts).argmax(-1).tolist()]
        while len(chosen) < max_new_tokens:
            chosen.append(self._model.step(chosen[-1]).argmax(-1).tolist())
        self._model.reset()
        return [list(row) for row in zip(*chosen, strict=True)]

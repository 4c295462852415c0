"""Runs an evaluation on a transformers model, plain or inside ``gsrq_export.coded(model, ...)``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from gsrq_export.evaluate.runner import LOGITS_BYTES, check_ids, check_prompts, token_nll


class TorchRunner:
    """The cache is the one the model makes for itself, so inside ``coded`` it is the coded one.

    Args:
        model: a transformers causal language model.
        exact_prefill: the cache rule's prefill is exact, so tokens are scored one by one (see Runner.nll).
    """

    def __init__(self, model: Any, exact_prefill: bool = False) -> None:
        self._model = model.eval()
        self._exact_prefill = exact_prefill
        config = model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._max_length = int(config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_length(self) -> int:
        return self._max_length

    @torch.inference_mode()
    def nll(self, ids: torch.Tensor, start: int = 1) -> torch.Tensor:
        check_ids(ids, start, self._vocab_size, self._max_length)
        ids = ids.to(self._model.device)
        steps = 1 if self._exact_prefill else max(1, LOGITS_BYTES // (4 * self._vocab_size * len(ids)))
        out = self._model(ids[:, :start], use_cache=True, logits_to_keep=1)
        parts = [token_nll(out.logits[:, -1:], ids[:, start : start + 1])]
        for t in range(start, ids.shape[1] - 1, steps):
            stop = min(t + steps, ids.shape[1] - 1)
            out = self._model(ids[:, t:stop], past_key_values=out.past_key_values, use_cache=True)
            parts.append(token_nll(out.logits, ids[:, t + 1 : stop + 1]))
        return torch.cat(parts, 1).cpu()

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        check_prompts(prompts, max_new_tokens, self._vocab_size, self._max_length)
        # Prompts of one length share a batch: no padding, which would take the places of sink tokens.
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_length[len(prompt)].append(row)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows in by_length.values():
            batch = torch.tensor([list(prompts[row]) for row in rows], device=self._model.device)
            out = self._model(batch, use_cache=True, logits_to_keep=1)
            chosen = [out.logits[:, -1].argmax(-1)]
            while len(chosen) < max_new_tokens:
                out = self._model(chosen[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
                chosen.append(out.logits[:, -1].argmax(-1))
            for row, answer in zip(rows, torch.stack(chosen, 1).tolist(), strict=True):
                answers[row] = answer
        return answers

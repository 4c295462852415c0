"""Runs an evaluation on a transformers model, plain or inside ``gsrq_export.coded(model, ...)``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gsrq_export.evaluate.runner import LOGITS_BYTES, Runner, Until, check_ids, check_prompts, continue_greedily


class TorchRunner(Runner):
    """The cache is the one the model makes for itself, so inside ``coded`` it is the coded one.

    Args:
        model: a transformers causal language model.
        exact_prefill: the cache rule's prefill is exact, so tokens are scored one by one (see Runner.logits).
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
    def logits(self, ids: torch.Tensor, start: int = 1) -> Iterator[torch.Tensor]:
        check_ids(ids, start, self._vocab_size, self._max_length)
        ids = ids.to(self._model.device)
        steps = 1 if self._exact_prefill else max(1, LOGITS_BYTES // (4 * self._vocab_size * len(ids)))
        out = self._model(ids[:, :start], use_cache=True, logits_to_keep=1)
        yield out.logits[:, -1:]
        for t in range(start, ids.shape[1] - 1, steps):
            stop = min(t + steps, ids.shape[1] - 1)
            out = self._model(ids[:, t:stop], past_key_values=out.past_key_values, use_cache=True)
            yield out.logits

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Until = None) -> list[list[int]]:
        check_prompts(prompts, max_new_tokens, self._vocab_size, self._max_length)
        # Prompts of one length share a batch: no padding, which would take the places of sink tokens.
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_length[len(prompt)].append(row)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows in by_length.values():
            batch = torch.tensor([list(prompts[row]) for row in rows], device=self._model.device)
            out = self._model(batch, use_cache=True, logits_to_keep=1)
            cache, first = out.past_key_values, out.logits[:, -1].argmax(-1).tolist()

            def step(tokens: list[int], cache: Any = cache) -> list[int]:
                new = torch.tensor(tokens, device=self._model.device)[:, None]
                out = self._model(new, past_key_values=cache, use_cache=True)
                return out.logits[:, -1].argmax(-1).tolist()  # type: ignore[no-any-return]

            for row, answer in zip(rows, continue_greedily(first, step, max_new_tokens, until), strict=True):
                answers[row] = answer
        return answers

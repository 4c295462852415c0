"""What an evaluation needs of a model, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from gsrq_export.errors import GsrqError

LOGITS_BYTES = 1 << 28  # of float32 logits formed at once
Until = Callable[[list[int]], bool] | None  # of a row's new tokens: whether they end it; None: nothing does


class Runner(Protocol):
    """A causal language model under one cache rule: exact, or the coded one that an artifact deploys."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""

    def logits(self, ids: torch.Tensor, start: int = 1) -> Iterator[torch.Tensor]:
        """The logits of tokens start .. T-1, each given all before it (teacher forcing), chunk by chunk.

        Tokens before ``start`` are a prompt, prefilled in one call. With coded prefill the rest gives the
        same numbers in one call as token by token. With exact prefill a call's own tokens are exact, so the
        rest is decoded token by token: only that is what generation sees.

        Args:
            ids: int64 [B, T], no padding.
            start: 1 <= start < T.
        Yields:
            float [B, n, vocab], at most LOGITS_BYTES or one position a chunk; T - start positions together.
        """

    def nll(self, ids: torch.Tensor, start: int = 1) -> torch.Tensor:
        """Negative log likelihood of tokens start .. T-1, each given all before it; see ``logits``.

        Returns:
            float32 [B, T - start], in nats.
        """
        parts, at = [], start
        for chunk in self.logits(ids, start):
            targets = ids[:, at : at + chunk.shape[1]]
            parts.append(token_nll(chunk, targets.to(chunk.device)).cpu())
            at += chunk.shape[1]
        return torch.cat(parts, 1)

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Until = None) -> list[list[int]]:
        """The most likely continuation of each prompt: ``max_new_tokens``, or fewer where ``until`` says so."""


def continue_greedily(
    first: list[int], step: Callable[[list[int]], list[int]], max_new_tokens: int, until: Until
) -> list[list[int]]:
    """What ``Runner.greedy`` returns, given the prompts' next tokens and a step from all rows' last tokens.

    Rows that have ended are stepped on, as the batch is one, and cut off.
    """
    answers: list[list[int]] = [[] for _ in first]
    going = [True] * len(first)
    tokens = first
    for taken in range(1, max_new_tokens + 1):
        for row, token in enumerate(tokens):
            if going[row]:
                answers[row].append(token)
                going[row] = until is None or not until(answers[row])
        if not any(going) or taken == max_new_tokens:
            break
        tokens = step(tokens)
    return answers


def check_ids(ids: torch.Tensor, start: int, vocab_size: int, max_length: int) -> None:
    """Refuse what ``nll`` cannot score, before anything runs."""
    if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[0] < 1:
        raise GsrqError(f"ids: need int64 [B >= 1, T], got {ids.dtype} {list(ids.shape)}")
    if not 1 <= start < ids.shape[1]:
        raise GsrqError(f"start: {start} is outside 1 .. {ids.shape[1] - 1}", "score at least the last token")
    if ids.shape[1] > max_length:
        raise GsrqError(
            f"ids: {ids.shape[1]} tokens exceed the model's {max_length}", f"use windows of at most {max_length} tokens"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise GsrqError(
            f"ids: token {low if low < 0 else high} is outside the vocabulary 0 .. {vocab_size - 1}",
            "tokenise with the model's own tokenizer",
        )


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, max_length: int) -> None:
    """Refuse prompts that ``greedy`` cannot continue, before anything runs."""
    if not prompts or max_new_tokens < 1:
        raise GsrqError(f"need at least one prompt and max_new_tokens >= 1, got {len(prompts)} and {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise GsrqError(f"prompts[{row}] is empty", "give at least one token")
        if len(prompt) + max_new_tokens > max_length:
            raise GsrqError(
                f"prompts[{row}]: {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's {max_length}",
                "shorten the prompt or ask for fewer tokens",
            )
        bad = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise GsrqError(
                f"prompts[{row}]: token {bad} is outside the vocabulary 0 .. {vocab_size - 1}",
                "tokenise with the model's own tokenizer",
            )


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits [..., vocab] and targets [...] -> float32 [...] in nats."""
    logits = logits.float()
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0]

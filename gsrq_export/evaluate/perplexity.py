"""Perplexity on windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.stats import bootstrap_mean


class PerplexityMetrics(TypedDict):
    """``interval`` is the 95 % bootstrap interval over windows; ``nll`` in nats a token; ``window_nll`` has
    each window's mean, in the text's order, for paired comparisons.
    """

    perplexity: float
    interval: list[float]
    nll: float
    window_nll: list[float]
    windows: int
    window_tokens: int
    prompt_tokens: int
    scored_tokens: int


def pick_windows(ids: Sequence[int], length: int, count: int) -> torch.Tensor:
    """At most ``count`` windows that do not overlap, spread evenly over the text: int64 [n, length].

    Raises:
        GsrqError: the text is shorter than one window.
    """
    have = len(ids) // length
    if have < 1:
        raise GsrqError(
            f"evaluation text: {len(ids)} tokens are fewer than one window of {length}",
            "give more held-out text or set a smaller window",
        )
    take = min(count, have)
    starts = [(have * i // take) * length for i in range(take)]
    return torch.tensor([list(ids[s : s + length]) for s in starts])


def perplexity(
    runner: Runner,
    ids: Sequence[int],
    *,
    window_tokens: int,
    windows: int,
    prompt_tokens: int = 1,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PerplexityMetrics:
    """Perplexity of the tokens after the first ``prompt_tokens`` of each window.

    Args:
        ids: the held-out text's tokens.
        window_tokens, windows: length of a window, and how many are scored at most.
        prompt_tokens: tokens of a window that are given, not scored.
        batch: windows scored in one call.
        progress: called with the windows done since the last call.
    Raises:
        GsrqError: too little text, or the model gives a likelihood that is not finite.
    """
    picked = pick_windows(ids, window_tokens, windows)
    means: list[float] = []
    for start in range(0, len(picked), batch):
        part = picked[start : start + batch]
        nll = runner.nll(part, prompt_tokens)
        bad = int((~torch.isfinite(nll)).sum())
        if bad:
            raise GsrqError(
                f"perplexity: {bad} of {nll.numel()} token likelihoods are NaN or infinite",
                "the codebooks or the model overflow; do not deploy this artifact",
            )
        means += nll.double().mean(1).tolist()
        if progress:
            progress(len(part))
    values = np.array(means)
    low, high = bootstrap_mean(values, seed)
    scored = len(picked) * (window_tokens - prompt_tokens)
    return PerplexityMetrics(
        perplexity=math.exp(values.mean()),
        interval=[math.exp(low), math.exp(high)],
        nll=float(values.mean()),
        window_nll=means,
        windows=len(picked),
        window_tokens=window_tokens,
        prompt_tokens=prompt_tokens,
        scored_tokens=scored,
    )

"""How close a coded model stays to the unquantized one over long generations.

The unquantized model continues prompts greedily and is recorded: inside ``coded(model, ...)`` the same torch
model is the coded one, so the two cannot take turns. The coded model is then measured against the record, along
the recorded tokens (teacher forcing: what does each step lose) and on its own (free running: how long do both
write the same).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.perplexity import pick_windows
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.traffic.tokens import starts_with_bos

RECORD_BYTES = 1 << 32  # of a record's log-probabilities


@dataclass(frozen=True)
class FidelitySettings:
    """``prompts`` of ``prompt_tokens`` held-out tokens at most, continued by ``new_tokens`` each."""

    prompts: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise GsrqError(f"evaluation.fidelity.{name}: {getattr(self, name)} is below 1", "use 1 or more")


@dataclass(frozen=True)
class Record:
    """The unquantized model's greedy continuations.

    Attributes:
        ids: int64 [prompts, prompt_tokens + new_tokens].
        log_probs: float16 [prompts, new_tokens, vocab] in nats. Rounding moves each by at most 2^-11 of itself
            and is as often up as down; a mean KL divergence moves by less than 1e-4 nats (the tests hold it so).
        settings: as asked for; ``prompts`` as many as the text had.
        seed: of the bootstrap.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    settings: FidelitySettings
    seed: int


class PromptMean(TypedDict):
    """A mean over prompts, its 95 % bootstrap interval, and each prompt's value."""

    mean: float
    interval: list[float]
    per_prompt: list[float]


class FidelityMetrics(TypedDict):
    """``top1_agreement``: share of positions along the recorded continuation whose most likely token is the
    recorded one. ``kl``: mean KL(unquantized || coded) along it, in nats a token. ``agreed_tokens``: tokens of
    the coded model's own greedy continuation before the first that differs; ``new_tokens`` if none does.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    top1_agreement: PromptMean
    kl: PromptMean
    agreed_tokens: PromptMean


def check_fidelity(runner: Runner, ids: Sequence[int], settings: FidelitySettings) -> None:
    """Refuse what `record` would, before anything runs."""
    total = settings.prompt_tokens + settings.new_tokens
    if total > runner.max_length:
        raise GsrqError(
            f"evaluation.fidelity.new_tokens: {settings.new_tokens} after {settings.prompt_tokens} exceed the model's "
            f"{runner.max_length} tokens",
            f"let prompt_tokens and new_tokens be at most {runner.max_length} together",
        )
    a_prompt = 2 * settings.new_tokens * runner.vocab_size
    if settings.prompts * a_prompt > RECORD_BYTES:
        raise GsrqError(
            f"evaluation.fidelity.prompts: {settings.prompts} prompts take {settings.prompts * a_prompt} bytes of "
            f"log-probabilities, over {RECORD_BYTES}",
            f"use at most {max(1, RECORD_BYTES // a_prompt)} prompts, or fewer new_tokens",
        )
    pick_windows(ids, settings.prompt_tokens, 1)


def record(
    runner: Runner,
    tokenizer: Any,
    ids: Sequence[int],
    settings: FidelitySettings,
    *,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Record:
    """Let the unquantized model continue prompts from all over the text, whether it would end or not.

    Args:
        tokenizer: tells whether prompts open with a start token, which then takes a prompt's first place.
        ids: the held-out text's tokens.
        batch: prompts at once.
        progress: called with the prompts done since the last call.
    Raises:
        GsrqError: settings that fit neither model, text nor memory (before anything runs), or a value that is
            not finite.
    """
    check_fidelity(runner, ids, settings)
    prompts = pick_windows(ids, settings.prompt_tokens, settings.prompts)
    bos = starts_with_bos(tokenizer)
    if bos is not None:
        prompts = torch.cat([torch.full((len(prompts), 1), bos), prompts[:, :-1]], 1)
    log_probs = torch.empty(len(prompts), settings.new_tokens, runner.vocab_size, dtype=torch.float16)
    whole = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = torch.tensor(runner.greedy(part.tolist(), settings.new_tokens))
        whole.append(torch.cat([part, answers], 1))
        at = 0
        for chunk in runner.logits(whole[-1], settings.prompt_tokens):
            found = torch.log_softmax(chunk.float(), -1)
            _require_finite(found, "the unquantized model")
            log_probs[start : start + len(part), at : at + chunk.shape[1]] = found
            at += chunk.shape[1]
        if progress:
            progress(len(part))
    asked = FidelitySettings(len(prompts), settings.prompt_tokens, settings.new_tokens)
    return Record(torch.cat(whole), log_probs, asked, seed)


def fidelity(
    runner: Runner, recorded: Record, *, batch: int = 8, progress: Callable[[int], None] | None = None
) -> FidelityMetrics:
    """Measure the coded model against the record.

    Raises:
        GsrqError: the models' vocabularies or lengths differ, or a value that is not finite.
    """
    settings, seed = recorded.settings, recorded.seed
    vocab = recorded.log_probs.shape[-1]
    if runner.vocab_size != vocab:
        raise GsrqError(
            f"the unquantized model has {vocab} tokens, the coded one {runner.vocab_size}",
            "give the model that the artifact was built from",
        )
    top1: list[float] = []
    kl: list[float] = []
    agreed: list[int] = []
    for start in range(0, len(recorded.ids), batch):
        ids = recorded.ids[start : start + batch]
        prompts, wanted = ids[:, : settings.prompt_tokens], ids[:, settings.prompt_tokens :]
        hits, divergences = [], []
        at = 0
        for chunk in runner.logits(ids, settings.prompt_tokens):
            stop = at + chunk.shape[1]
            hits.append(chunk.argmax(-1).cpu() == wanted[:, at:stop])
            exact = recorded.log_probs[start : start + len(ids), at:stop].to(chunk.device)
            divergences.append(_kl(exact, chunk).cpu())
            at = stop
        top1 += torch.cat(hits, 1).double().mean(1).tolist()
        kl += torch.cat(divergences, 1).double().mean(1).tolist()
        own = torch.tensor(runner.greedy(prompts.tolist(), settings.new_tokens))
        agreed += (own == wanted).long().cumprod(1).sum(1).tolist()
        if progress:
            progress(len(ids))
    return FidelityMetrics(
        prompts=settings.prompts,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        top1_agreement=_mean(top1, seed),
        kl=_mean(kl, seed),
        agreed_tokens=_mean([float(count) for count in agreed], seed),
    )


def _kl(log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """float16 log-probabilities and logits [B, n, vocab] -> float32 [B, n] in nats."""
    log_q = torch.log_softmax(logits.float(), -1)
    _require_finite(log_q, "the coded model")
    log_p = torch.log_softmax(log_p.float(), -1)  # rounded ones do not quite sum to one
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mean(values: Sequence[float], seed: int) -> PromptMean:
    array = np.array(values, np.float64)
    return PromptMean(
        mean=float(array.mean()), interval=list(bootstrap_mean(array, seed)), per_prompt=[float(v) for v in values]
    )


def _require_finite(log_probs: torch.Tensor, whose: str) -> None:
    bad = int((~torch.isfinite(log_probs)).sum())
    if bad:
        raise GsrqError(
            f"fidelity: {bad} of {log_probs.numel()} log-probabilities of {whose} are NaN or infinite",
            "the codebooks or the model overflow; do not deploy this artifact",
        )

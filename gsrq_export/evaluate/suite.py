"""The evaluation of one runner, and of a coded one against the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.perplexity import PerplexityMetrics, perplexity, pick_windows
from gsrq_export.evaluate.recall import RecallMetrics, check_lengths, make_cases, recall
from gsrq_export.evaluate.runner import Runner


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        window_tokens, windows: perplexity windows: tokens in each, and how many at most.
        prompt_tokens: tokens of a window that are given, not scored. For an artifact with exact prefill set
            half a window: the rest is decoded token by token.
        recall_lengths: context lengths of the recall task in tokens; empty skips it.
        recall_cases: cases a length.
        batch: rows at once.
        seed: of the recall cases and the bootstrap.
    """

    window_tokens: int = 512
    windows: int = 32
    prompt_tokens: int = 1
    recall_lengths: tuple[int, ...] = (512, 1024)
    recall_cases: int = 24
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("recall_cases", 1), ("batch", 1), ("seed", 0), ("prompt_tokens", 1)):
            if getattr(self, name) < least:
                raise GsrqError(f"evaluation.{name}: {getattr(self, name)} is below {least}", f"use {least} or more")
        if self.prompt_tokens >= self.window_tokens:
            raise GsrqError(
                f"evaluation.prompt_tokens: {self.prompt_tokens} leaves nothing to score in windows of "
                f"{self.window_tokens}",
                "use a smaller prompt_tokens or a larger window_tokens",
            )

    @property
    def steps(self) -> int:
        """Windows and cases at most: the length of a progress bar."""
        return self.windows + self.recall_cases * len(self.recall_lengths)


def given_tokens(window_tokens: int, exact_prefill: bool) -> int:
    """Tokens of a window that are a prompt: one; with exact prefill half, as only the rest is decoded from codes."""
    return window_tokens // 2 if exact_prefill else 1


class Evaluation(TypedDict):
    """Metrics of one runner; ``recall`` is None where it was not asked for."""

    perplexity: PerplexityMetrics
    recall: RecallMetrics | None
    seed: int


class RecallRatio(TypedDict):
    """``retained`` is coded / exact; None where the exact model scores 0."""

    tokens: int
    exact: float
    coded: float
    retained: float | None


class Comparison(TypedDict):
    """Coded against exact. ``perplexity_ratio`` above 1 is a loss; ``nll_increase`` in nats a token."""

    perplexity_ratio: float
    nll_increase: float
    recall: list[RecallRatio]


def evaluate(
    runner: Runner,
    tokenizer: Any,
    text: str,
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Perplexity and recall of ``runner`` on held-out ``text``.

    Args:
        tokenizer: the model's own.
        progress: called with the windows and cases done since the last call.
    Returns:
        plain data that json.dump(..., allow_nan=False) takes.
    Raises:
        GsrqError: settings that do not fit the model or the text (before anything runs), or a value that is
            not finite.
    """
    if settings.window_tokens > runner.max_length:
        raise GsrqError(
            f"evaluation.window_tokens: {settings.window_tokens} exceeds the model's {runner.max_length} tokens",
            f"use at most {runner.max_length}",
        )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if ids and max(ids) >= runner.vocab_size:
        raise GsrqError(
            f"the tokenizer gives token {max(ids)}, the model knows 0 .. {runner.vocab_size - 1}",
            "use the tokenizer that belongs to the model",
        )
    pick_windows(ids, settings.window_tokens, 1)
    check_lengths(settings.recall_lengths, runner.max_length)
    for length in settings.recall_lengths:
        make_cases(ids, tokenizer, length, 1, settings.seed)
    metrics = Evaluation(
        perplexity=perplexity(
            runner,
            ids,
            window_tokens=settings.window_tokens,
            windows=settings.windows,
            prompt_tokens=settings.prompt_tokens,
            batch=settings.batch,
            seed=settings.seed,
            progress=progress,
        ),
        recall=recall(
            runner,
            tokenizer,
            ids,
            lengths=settings.recall_lengths,
            cases=settings.recall_cases,
            batch=settings.batch,
            seed=settings.seed,
            progress=progress,
        )
        if settings.recall_lengths
        else None,
        seed=settings.seed,
    )
    require_finite(metrics, "evaluation")
    return metrics


def compare(exact: Evaluation, coded: Evaluation) -> Comparison:
    """What coding costs, from two evaluations of the same settings.

    Raises:
        GsrqError: the two were not measured on the same windows and cases.
    """
    for field in ("windows", "window_tokens", "prompt_tokens", "scored_tokens"):
        ours, theirs = exact["perplexity"][field], coded["perplexity"][field]
        _same(f"perplexity.{field}", ours, theirs)
    _same("seed", exact["seed"], coded["seed"])
    exact_rows, coded_rows = [m["recall"]["lengths"] if m["recall"] else [] for m in (exact, coded)]
    _same(
        "recall lengths",
        [(r["tokens"], r["cases"]) for r in exact_rows],
        [(r["tokens"], r["cases"]) for r in coded_rows],
    )
    rows = []
    for one, other in zip(exact_rows, coded_rows, strict=True):
        before, after = one["rate"] or 0.0, other["rate"] or 0.0
        rows.append(
            RecallRatio(tokens=one["tokens"], exact=before, coded=after, retained=after / before if before else None)
        )
    increase = coded["perplexity"]["nll"] - exact["perplexity"]["nll"]
    comparison = Comparison(perplexity_ratio=math.exp(increase), nll_increase=increase, recall=rows)
    require_finite(comparison, "comparison")
    return comparison


def require_finite(value: object, where: str) -> None:
    """Raise GsrqError naming the place if a float anywhere in the data is NaN or infinite."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            require_finite(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            require_finite(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise GsrqError(f"{where} is {value}", "the model or the codebooks overflow; do not deploy this artifact")


def _same(name: str, exact: object, coded: object) -> None:
    if exact != coded:
        raise GsrqError(
            f"{name} differs: {exact} for the exact model, {coded} for the coded one",
            "evaluate both with the same settings and text",
        )

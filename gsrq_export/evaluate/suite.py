"""The evaluation of one runner, and of a coded one against the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.fidelity import FidelityMetrics, FidelitySettings, check_fidelity, fidelity, record
from gsrq_export.evaluate.perplexity import PerplexityMetrics, perplexity, pick_windows
from gsrq_export.evaluate.recall import RecallMetrics, check_lengths, make_cases, recall
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.stats import bootstrap_mean
from gsrq_export.evaluate.tasks.measure import TaskScore, TaskSettings, check_tasks, run_tasks
from gsrq_export.stages.progress import Reporter


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
        seed: of the cases and the bootstrap.
        tasks: long-context tasks; None skips them.
        fidelity: of long generations, where two runners are compared; None skips it.
    """

    window_tokens: int = 512
    windows: int = 32
    prompt_tokens: int = 1
    recall_lengths: tuple[int, ...] = (512, 1024)
    recall_cases: int = 24
    batch: int = 8
    seed: int = 0
    tasks: TaskSettings | None = None
    fidelity: FidelitySettings | None = None

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
        """Windows and cases of one runner at most: the length of a progress bar."""
        return self.windows + self.recall_cases * len(self.recall_lengths) + (self.tasks.steps if self.tasks else 0)


def given_tokens(window_tokens: int, exact_prefill: bool) -> int:
    """Tokens of a window that are a prompt: one; with exact prefill half, as only the rest is decoded from codes."""
    return window_tokens // 2 if exact_prefill else 1


class _Tasks(TypedDict, total=False):
    tasks: list[TaskScore]


class Evaluation(_Tasks):
    """Metrics of one runner; ``recall`` is None and ``tasks`` is not there where not asked for."""

    perplexity: PerplexityMetrics
    recall: RecallMetrics | None
    seed: int


class RecallRatio(TypedDict):
    """``retained`` is coded / exact; None where the exact model scores 0."""

    tokens: int
    exact: float
    coded: float
    retained: float | None


class TaskDifference(TypedDict):
    """``difference`` is coded - exact, the mean over the same cases; ``interval`` its 95 % bootstrap interval."""

    task: str
    tokens: int
    exact: float
    coded: float
    difference: float
    interval: list[float]


class _Long(TypedDict, total=False):
    tasks: list[TaskDifference]
    fidelity: FidelityMetrics


class Comparison(_Long):
    """Coded against exact. ``perplexity_ratio`` above 1 is a loss; ``nll_increase`` in nats a token. ``tasks`` and
    ``fidelity`` are there where asked for.
    """

    perplexity_ratio: float
    nll_increase: float
    recall: list[RecallRatio]


class Pair(TypedDict):
    """The two evaluations and what they say together."""

    exact: Evaluation
    coded: Evaluation
    comparison: Comparison


def evaluate(
    runner: Runner,
    tokenizer: Any,
    text: str,
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Perplexity, recall and tasks of ``runner`` on held-out ``text``.

    Args:
        tokenizer: the model's own.
        progress: called with the windows and cases done since the last call.
    Returns:
        plain data that json.dump(..., allow_nan=False) takes.
    Raises:
        GsrqError: settings that do not fit the model or the text (before anything runs), or a value that is
            not finite.
    """
    return _measured(runner, tokenizer, _checked_ids(runner, tokenizer, text, settings), settings, progress)


def evaluate_pair(
    exact: Runner, coded: Runner, tokenizer: Any, text: str, settings: EvaluationSettings, reporter: Reporter
) -> Pair:
    """Both runners on the same windows, cases and prompts, and their comparison, fidelity included.

    Args:
        exact, coded: over two models; not over one that is coded for the time being.
    Raises:
        GsrqError: as `evaluate`.
    """
    for runner in (exact, coded):
        ids = _checked_ids(runner, tokenizer, text, settings)
    with reporter.task("evaluate: exact, windows and cases", settings.steps) as task:
        before = _measured(exact, tokenizer, ids, settings, task.advance)
    with reporter.task("evaluate: coded, windows and cases", settings.steps) as task:
        after = _measured(coded, tokenizer, ids, settings, task.advance)
    comparison = compare(before, after)
    if asked := settings.fidelity:
        batch = settings.batch
        with reporter.task("evaluate: fidelity, prompts", 2 * asked.prompts) as task:
            recorded = record(exact, tokenizer, ids, asked, batch=batch, seed=settings.seed, progress=task.advance)
            comparison["fidelity"] = fidelity(coded, recorded, batch=batch, progress=task.advance)
        require_finite(comparison, "comparison")
    return Pair(exact=before, coded=after, comparison=comparison)


def _measured(
    runner: Runner,
    tokenizer: Any,
    ids: list[int],
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None,
) -> Evaluation:
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
    if settings.tasks:
        metrics["tasks"] = run_tasks(
            runner, tokenizer, ids, settings.tasks, batch=settings.batch, seed=settings.seed, progress=progress
        )
    require_finite(metrics, "evaluation")
    return metrics


def _checked_ids(runner: Runner, tokenizer: Any, text: str, settings: EvaluationSettings) -> list[int]:
    """The text's tokens, after all that can be refused without running the model."""
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
    if settings.tasks:
        check_tasks(runner, tokenizer, ids, settings.tasks, settings.seed)
    if settings.fidelity:
        check_fidelity(runner, ids, settings.fidelity)
    return ids


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
    exact_tasks, coded_tasks = exact.get("tasks", []), coded.get("tasks", [])
    _same("tasks", *([(r["task"], r["tokens"], r["cases"]) for r in part] for part in (exact_tasks, coded_tasks)))
    if exact_tasks:
        comparison["tasks"] = [
            _difference(one, other, exact["seed"]) for one, other in zip(exact_tasks, coded_tasks, strict=True)
        ]
    require_finite(comparison, "comparison")
    return comparison


def _difference(exact: TaskScore, coded: TaskScore, seed: int) -> TaskDifference:
    pairs = np.array(coded["case_scores"]) - np.array(exact["case_scores"])
    return TaskDifference(
        task=exact["task"],
        tokens=exact["tokens"],
        exact=exact["score"],
        coded=coded["score"],
        difference=float(pairs.mean()),
        interval=list(bootstrap_mean(pairs, seed)),
    )


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

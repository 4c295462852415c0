"""Measures one runner on the windows and cases of a baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.perplexity import pick_windows
from gsrq_export.evaluate.recall import make_cases
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.suite import EvaluationSettings, evaluate
from gsrq_export.gate.baseline import Hits, Run, Settings
from gsrq_export.runtime.metadata import CacheMetadata


def read_text(path: Path) -> tuple[str, str]:
    """The held-out text and its sha256.

    Raises:
        GsrqError: not readable, or not UTF-8.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise GsrqError(f"--text {path}: {error}", "give a readable UTF-8 text file") from error


def settings_of(evaluation: EvaluationSettings, exact_prefill: bool) -> Settings:
    """As they stand in a baseline."""
    return Settings(
        window_tokens=evaluation.window_tokens,
        windows=evaluation.windows,
        prompt_tokens=evaluation.prompt_tokens,
        recall_lengths=list(evaluation.recall_lengths),
        recall_cases=evaluation.recall_cases,
        batch=evaluation.batch,
        seed=evaluation.seed,
        prefill="exact" if exact_prefill else "coded",
    )


def evaluation_of(settings: Settings) -> EvaluationSettings:
    """What `evaluate` takes.

    Raises:
        GsrqError: settings that contradict each other.
    """
    fields = settings.model_dump(exclude={"prefill"})
    return EvaluationSettings(**{**fields, "recall_lengths": tuple(settings.recall_lengths)})


def units_hash(tokenizer: Any, text: str, settings: Settings) -> tuple[str, int]:
    """sha256 over the tokens of every window and case, and how many windows the text has for the settings.

    Raises:
        GsrqError: the text is too short for a window or a case.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    windows = pick_windows(ids, settings.window_tokens, settings.windows)
    arrays = [windows.numpy()]
    for length in settings.recall_lengths:
        for case in make_cases(ids, tokenizer, length, settings.recall_cases, settings.seed):
            arrays += [case.prompt, case.answer]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest(), len(windows)


def measure(
    runner: Runner, tokenizer: Any, text: str, settings: Settings, progress: Callable[[int], None] | None = None
) -> Run:
    """Perplexity of each window and the result of each case.

    Raises:
        GsrqError: settings that the model does not fit, or a figure that is not finite.
    """
    found = evaluate(runner, tokenizer, text, evaluation_of(settings), progress)
    recall = found["recall"]["lengths"] if found["recall"] else []
    return Run(
        window_nll=found["perplexity"]["window_nll"],
        recall=[Hits(tokens=row["tokens"], hits="".join("01"[hit] for hit in row["hits"])) for row in recall],
    )


def fewest_coded(metadata: CacheMetadata, settings: Settings) -> int:
    """Tokens in codes when the last token of the shortest window or case is scored."""
    shortest = min([settings.window_tokens, *settings.recall_lengths])
    return int(metadata.rule.coded(shortest - 1))


def longest(settings: Settings) -> int:
    """Tokens of the longest window or case."""
    return max([settings.window_tokens, *settings.recall_lengths])


def cache_bytes(metadata: CacheMetadata, tokens: int) -> int:
    """Bytes of one sequence's cache with ``tokens`` tokens in it, as the runtime would allocate it."""
    return metadata.row_bytes(max(metadata.rule.block, int(metadata.rule.coded(tokens))))

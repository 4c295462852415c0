"""The build's comparison: rival quantizers beside the artifact's own codebooks, on the evaluation's text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsrq_export.baselines.methods import chosen
from gsrq_export.build.source import Source
from gsrq_export.capture import Captured, CaptureSettings, capture, shard_batch
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.compare.run import run_comparison
from gsrq_export.compare.schema import Model, Rule
from gsrq_export.compare.subject import EvaluationText, Ours, Subject
from gsrq_export.stages.engine import Context

COMPARISON = "compare.json"


def subject_of(
    source: Source,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    texts: Sequence[EvaluationText],
    captured: Callable[[int | None], Captured],
) -> Subject:
    """What a recipe's methods are compared on.

    Args:
        ids: int64 [N, T], the calibration tokens.
        captured: their keys and values, with gradient norms of parts of so many elements, or without.
    """
    rule = source.recipe.cache
    return Subject(
        model=source.model,
        tokenizer=source.tokenizer,
        spec=source.spec,
        identity=Model(id=Path(source.recipe.model.path).name, weights_sha256=source.weight_hash),
        rule=Rule(sinks=rule.sinks, window=rule.window, block=rule.block, exact_dtype=rule.exact_dtype),
        ids=ids,
        texts=texts,
        capture=captured,
    )


def compare_stage(source: Source, text: EvaluationText, codebooks: Path, context: Context) -> None:
    """Writes compare.json, row by row: what an interrupted run has measured is kept.

    Args:
        text: and what is measured on it.
        codebooks: the artifact's.
    """
    recipe = source.recipe
    wanted = recipe.evaluate and recipe.evaluate.compare
    assert wanted
    ids = np.load(context.inputs["traffic"] / "ids.npy", allow_pickle=False)
    ours = Ours("ours", f"ours: {recipe.name}", load_codebooks(codebooks), recipe.codec.beam)
    with tempfile.TemporaryDirectory(dir=context.directory) as folder:

        def captured(width: int | None) -> Captured:
            if width is None and recipe.capture.vectors is None:  # vectors alone: the build has them
                return Captured(context.inputs["capture"])
            settings = CaptureSettings(
                width or 1, width or 1, gradients=width is not None, batch=shard_batch(ids.shape[1])
            )
            with context.reporter.task("compare: capture, sequences", len(ids)) as task:
                capture(source.model, source.spec, ids, settings, Path(folder), task.advance)
            return Captured(Path(folder))

        run_comparison(
            context.directory / COMPARISON,
            subject_of(source, ids, [text], captured),
            chosen(wanted.methods),
            [ours, *(ours.prefix(share) for share in wanted.prefixes)],
            [recipe.cache.prefill],
            context.reporter,
        )

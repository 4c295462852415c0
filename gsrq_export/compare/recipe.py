"""A comparison from a recipe: a build's stages give the calibration tokens and, without an artifact, our codebooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.build.rivals import subject_of
from gsrq_export.build.source import Source
from gsrq_export.build.stages import (
    SAMPLED_TEXT,
    evaluation_settings,
    held_out_text,
    last_training,
    stages,
)
from gsrq_export.capture import Captured, CaptureSettings, capture, shard_batch
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.compare.subject import EvaluationText, Ours, Subject
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.suite import EvaluationSettings
from gsrq_export.export.model import CODEBOOKS_FILE
from gsrq_export.recipe import EvaluateRecipe, Recipe
from gsrq_export.stages.engine import Context, Pipeline, Stage
from gsrq_export.stages.progress import Reporter

RIVALS = "rivals"  # the stage that captures at the width the rivals need


def ours_of_artifact(artifact: Path, source: Source) -> Ours:
    """The codebooks and beam that an artifact deploys.

    Raises:
        GsrqError: not a sound artifact, or one of another model.
    """
    manifest = verify_artifact(artifact).manifest
    if manifest.model.weights_sha256 != source.weight_hash:
        raise GsrqError(
            f"--artifact {artifact} was built from weights {manifest.model.weights_sha256}, "
            f"the recipe's model has {source.weight_hash}",
            "give an artifact of the recipe's model",
        )
    layers = load_codebooks(artifact / CODEBOOKS_FILE)
    return Ours("ours", f"ours: {manifest.name}", layers, manifest.cache.beam)


def subject_of_recipe(
    source: Source,
    work: Path,
    device: str,
    train: bool,
    texts: Sequence[EvaluationText] | None,
    settings: EvaluationSettings,
    reporter: Reporter,
) -> tuple[Subject, Ours | None]:
    """Run the stages that a comparison needs (those done before are kept) and put together what it is made on.

    Args:
        work: the stages' directory; a build's serves.
        train: whether our codebooks are to be trained as the recipe says.
        texts: None: the recipe's held-out text, or one sampled from the model, measured by ``settings``.
    """
    recipe = source.recipe
    done = Pipeline(work, _up_to(stages(source), last_training(recipe) if train else "traffic"), reporter).run()
    ours = None
    if train:
        layers = load_codebooks(done[last_training(recipe)] / CODEBOOKS_FILE)
        ours = Ours("ours", f"ours: {recipe.name}", layers, recipe.codec.beam)
    if texts is None:
        texts = [EvaluationText("held-out", _held_out(source, settings), settings)]
    ids = np.load(done["traffic"] / "ids.npy", allow_pickle=False)
    source.model.to(device)
    subject = subject_of(source, ids, texts, _capturing(source, work, device, reporter))
    return subject, ours


def settings_of_recipe(recipe: Recipe) -> EvaluationSettings:
    """What the recipe's evaluation asks for; its defaults where it has none."""
    return evaluation_settings(recipe.evaluate or EvaluateRecipe(), recipe)


def _held_out(source: Source, settings: EvaluationSettings) -> str:
    evaluate = source.recipe.evaluate or EvaluateRecipe()
    # Enough for the windows, and for cases of any length that the model is exported for.
    tokens = settings.window_tokens * settings.windows + 2 * source.recipe.export.max_length
    return held_out_text(evaluate.text or SAMPLED_TEXT, source, tokens)


def _capturing(source: Source, work: Path, device: str, reporter: Reporter) -> Callable[[int | None], Captured]:
    def captured(width: int | None) -> Captured:
        material = {"weights": source.weight_hash, "tokenizer": source.tokenizer_hashes, "width": width, "on": device}
        stage = Stage(RIVALS, material, partial(_capture, source, width), ("traffic",))
        done = Pipeline(work, [*_up_to(stages(source), "traffic"), stage], reporter).run()
        return Captured(done[RIVALS])

    return captured


def _capture(source: Source, width: int | None, context: Context) -> None:
    ids = np.load(context.inputs["traffic"] / "ids.npy", allow_pickle=False)
    batch = shard_batch(ids.shape[1])
    settings = CaptureSettings(width or 1, width or 1, gradients=width is not None, batch=batch)
    with context.reporter.task("capture for the rivals: sequences", len(ids)) as task:
        capture(source.model, source.spec, ids, settings, context.directory, task.advance)
    shape = json.dumps({"sequences": len(ids), "gradient_width": width})
    context.unit("capture.json", lambda path: path.write_text(shape + "\n"))


def _up_to(all_stages: Sequence[Stage], name: str) -> list[Stage]:
    """The stage and those that it needs, in order."""
    by_name = {stage.name: stage for stage in all_stages}
    needed, queue = {name}, [name]
    while queue:
        more = [need for need in by_name[queue.pop()].needs if need not in needed]
        needed |= set(more)
        queue += more
    return [stage for stage in all_stages if stage.name in needed]

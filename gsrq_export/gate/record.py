"""Records a baseline: the unquantized model once, through torch, and the artifact that is accepted."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from gsrq_export import __version__
from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.suite import EvaluationSettings
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.gate.baseline import KIND, SCHEMA, Baseline, Gates, Run
from gsrq_export.gate.bounds import cases_needed
from gsrq_export.gate.check import accepted_run, artifact_properties
from gsrq_export.gate.gates import Measured, judge
from gsrq_export.gate.measure import fewest_coded, longest, measure, read_text, settings_of, units_hash
from gsrq_export.gate.verdict import GateReport
from gsrq_export.model.loading import load_original, model_directory, weight_hash
from gsrq_export.runtime.generate import load_tokenizer
from gsrq_export.runtime.session import OrtModel
from gsrq_export.stages.keys import environment
from gsrq_export.stages.progress import Reporter

MIN_WINDOWS = 8  # with fewer, a bound by Student's t leans on normality more than means of windows deserve


def record_baseline(
    artifact: Path,
    model: OrtModel,
    text_file: Path,
    model_path: str,
    evaluation: EvaluationSettings,
    gates: Gates,
    reporter: Reporter,
) -> tuple[Baseline, GateReport]:
    """Measure both and judge the artifact by the limits that the baseline will hold.

    Args:
        model: the artifact, opened on the backend that deploys it.
        model_path: the unquantized model, a directory or hub id; its weights must be those of the manifest.
        evaluation: fewer windows are taken where the text has fewer.
    Raises:
        GsrqError: an artifact that is not sound, another model, too little text, settings with which no
            artifact could pass (all before anything runs), or an unquantized model that cannot do the task.
    """
    started = time.monotonic()
    manifest = verify_artifact(artifact).manifest
    text, text_hash = read_text(text_file)
    tokenizer = load_tokenizer(artifact)
    settings = settings_of(evaluation, model.metadata.exact_prefill)
    if longest(settings) > model.max_length:
        raise GsrqError(
            f"windows or cases of {longest(settings)} tokens exceed the artifact's {model.max_length}",
            f"use at most {model.max_length}",
        )
    if fewest_coded(model.metadata, settings) < 1:
        rule = model.metadata.rule
        raise GsrqError(
            f"windows or cases of {min([settings.window_tokens, *settings.recall_lengths])} tokens end before the "
            "first block is coded, so they would measure the exact cache",
            f"use more than {rule.sinks + rule.window + rule.block} tokens",
        )
    if settings.recall_lengths and settings.recall_cases < (
        need := cases_needed(gates.max_recall_loss, gates.confidence)
    ):
        raise GsrqError(
            f"recall cases: {settings.recall_cases} cannot show a loss of at most {gates.max_recall_loss:g} at "
            f"{100 * gates.confidence:g} % confidence, even if none is lost",
            f"use {need} or more, or a larger max_recall_loss",
        )
    units, windows = units_hash(tokenizer, text, settings)
    if windows < MIN_WINDOWS:
        raise GsrqError(
            f"{windows} windows are too few for a confidence bound (asked for {evaluation.windows})",
            f"use {MIN_WINDOWS} or more, more text, or shorter windows",
        )
    settings = settings_of(replace(evaluation, windows=windows), model.metadata.exact_prefill)
    directory = model_directory(model_path)
    weights = weight_hash(directory)
    if weights != manifest.model.weights_sha256:
        raise GsrqError(
            f"--model {model_path} has weights {weights}, the artifact was built from {manifest.model.weights_sha256}",
            "give the model that it was built from",
        )
    exact_model = load_original(model_path, directory, tokenizer)
    steps = windows + settings.recall_cases * len(settings.recall_lengths)
    with reporter.task("unquantized: windows and cases", steps) as task:
        exact = measure(TorchRunner(exact_model), tokenizer, text, settings, task.advance)
    _check_able(exact, gates)
    with reporter.task("artifact: windows and cases", steps) as task:
        run = measure(OrtRunner(model), tokenizer, text, settings, task.advance)
    baseline = Baseline(
        kind=KIND,
        schema_version=SCHEMA,
        created_by=f"gsrq-export {__version__}",
        environment=environment(),
        model_id=manifest.model.id,
        weights_sha256=weights,
        text_sha256=text_hash,
        units_sha256=units,
        settings=settings,
        gates=gates,
        exact=exact,
        accepted=accepted_run(run, model, manifest, longest(settings)),
    )
    measured = Measured(
        run.window_nll, run.recall, fewest_coded(model.metadata, settings), baseline.accepted.cache_bytes
    )
    properties = {**artifact_properties(manifest), "backend": model.backend}
    return baseline, GateReport(str(artifact), judge(baseline, measured, gates), time.monotonic() - started, properties)


def _check_able(exact: Run, gates: Gates) -> None:
    """A task that the unquantized model cannot do can show no loss."""
    for row in exact.recall:
        right = row.hits.count("1")
        if right / len(row.hits) <= gates.max_recall_loss:
            raise GsrqError(
                f"recall at {row.tokens}: the unquantized model has {right} of {len(row.hits)} right, so a loss of "
                f"more than {gates.max_recall_loss:g} cannot show",
                "use a shorter length, or --no-recall for a model that cannot do the task",
            )

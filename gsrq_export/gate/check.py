"""Checks an artifact against a baseline: only the artifact runs, through ONNX Runtime as deployed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gsrq_export.artifact.manifest import Manifest
from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.gate.baseline import Accepted, Baseline, Gates, Run, load_baseline
from gsrq_export.gate.gates import Measured, judge
from gsrq_export.gate.measure import cache_bytes, evaluation_of, fewest_coded, longest, measure, read_text, units_hash
from gsrq_export.gate.verdict import GateReport, GateResult, Verdict
from gsrq_export.runtime.generate import load_tokenizer
from gsrq_export.runtime.session import OrtModel
from gsrq_export.stages.keys import environment
from gsrq_export.stages.progress import Reporter


class _Incomplete(Exception):
    """Nothing can be compared; carries the step that failed and why."""


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except _Incomplete:
        raise
    except GsrqError as error:
        raise _Incomplete(name, str(error)) from error
    except Exception as error:  # whatever breaks, an artifact that was not measured must not pass
        raise _Incomplete(name, f"crashed: {type(error).__name__}: {error}") from error


def check_artifact(
    artifact: Path,
    baseline_file: Path,
    text_file: Path,
    limits: Mapping[str, float | None],
    open_model: Callable[[Path], OrtModel],
    reporter: Reporter,
) -> GateReport:
    """Measure the artifact on the baseline's windows and cases and judge it.

    What keeps it from being measured is a result too (INCOMPLETE), so that CI gets its report.

    Args:
        limits: fields of Gates that take the place of the baseline's; None leaves one.
        open_model: opens the artifact on the backend that deploys it.
    Raises:
        GsrqError: a limit out of range.
    """
    Gates().override(limits)
    started = time.monotonic()
    properties: dict[str, str] = {}
    try:
        results = _check(artifact, baseline_file, text_file, limits, open_model, reporter, properties)
    except _Incomplete as stopped:
        step, problem = stopped.args
        results = [GateResult(step, Verdict.INCOMPLETE, problem)]
    return GateReport(str(artifact), results, time.monotonic() - started, properties)


def _check(
    artifact: Path,
    baseline_file: Path,
    text_file: Path,
    limits: Mapping[str, float | None],
    open_model: Callable[[Path], OrtModel],
    reporter: Reporter,
    properties: dict[str, str],
) -> list[GateResult]:
    with _step("baseline"):
        baseline = load_baseline(baseline_file)
        evaluation = evaluation_of(baseline.settings)
        gates = baseline.gates.override(limits)
        properties.update(_baseline_properties(baseline, gates))
    with _step("text"):
        text, digest = read_text(text_file)
        if digest != baseline.text_sha256:
            raise GsrqError(
                f"--text {text_file} has sha256 {digest}, the baseline was recorded on {baseline.text_sha256}",
                "give the same file, or record the baseline again",
            )
    with _step("artifact"):
        manifest = verify_artifact(artifact).manifest
        properties.update(artifact_properties(manifest))
        if manifest.model.weights_sha256 != baseline.weights_sha256:
            raise GsrqError(
                f"the artifact was built from a model with weights {manifest.model.weights_sha256}, the baseline is of "
                f"{baseline.weights_sha256} ({baseline.model_id})",
                "record a baseline of this model",
            )
        model = open_model(artifact)
        tokenizer = load_tokenizer(artifact)
        properties["backend"] = model.backend
    with _step("settings"):
        _check_settings(model, tokenizer, text, baseline)
    with _step("evaluation"), reporter.task("artifact: windows and cases", evaluation.steps) as task:
        run = measure(OrtRunner(model), tokenizer, text, baseline.settings, task.advance)
    measured = Measured(
        run.window_nll,
        run.recall,
        fewest_coded(model.metadata, baseline.settings),
        cache_bytes(model.metadata, baseline.accepted.cache_tokens),
    )
    with _step("gates"):
        return judge(baseline, measured, gates)


def _check_settings(model: OrtModel, tokenizer: Any, text: str, baseline: Baseline) -> None:
    """The same prefill, and token by token the same windows and cases."""
    prefill = "exact" if model.metadata.exact_prefill else "coded"
    if prefill != baseline.settings.prefill:
        raise GsrqError(
            f"the artifact's prefill is {prefill}, the baseline's {baseline.settings.prefill}",
            "they are different measurements; record a baseline for this cache rule",
        )
    most = longest(baseline.settings)
    if most > model.max_length:
        raise GsrqError(
            f"the baseline measures {most} tokens, the artifact takes {model.max_length}",
            "build with a larger export.max_length, or record a baseline of shorter lengths",
        )
    if units_hash(tokenizer, text, baseline.settings)[0] != baseline.units_sha256:
        raise GsrqError(
            "the settings, the tokenizer or this version of the program give other windows or cases than the "
            "baseline's",
            "record the baseline again",
        )


def accepted_run(run: Run, model: OrtModel, manifest: Manifest, tokens: int) -> Accepted:
    """The accepted artifact's part of a baseline. tokens: at which its memory is stated."""
    return Accepted(
        window_nll=run.window_nll,
        recall=run.recall,
        name=manifest.name,
        codebooks_sha256=manifest.files["codebooks.safetensors"].sha256,
        graph_sha256=manifest.files["model.onnx"].sha256,
        backend=model.backend,
        cache_tokens=tokens,
        cache_bytes=cache_bytes(model.metadata, tokens),
    )


def artifact_properties(manifest: Manifest) -> dict[str, str]:
    """What was measured, for reports."""
    return {
        "artifact.name": manifest.name,
        "artifact.codebooks_sha256": manifest.files["codebooks.safetensors"].sha256,
        "artifact.graph_sha256": manifest.files["model.onnx"].sha256,
        "artifact.weights_sha256": manifest.model.weights_sha256,
    }


def _baseline_properties(baseline: Baseline, gates: Gates) -> dict[str, str]:
    found = {
        "model": baseline.model_id,
        "accepted.name": baseline.accepted.name,
        "accepted.codebooks_sha256": baseline.accepted.codebooks_sha256,
        "accepted.backend": baseline.accepted.backend,
        "text_sha256": baseline.text_sha256,
    }
    found |= {f"settings.{name}": str(value) for name, value in baseline.settings.model_dump().items()}
    recorded = baseline.gates.model_dump()
    for name, value in gates.model_dump().items():
        found[f"gates.{name}"] = f"{value!r}" + ("" if value == recorded[name] else f" (baseline {recorded[name]!r})")
    here = environment()
    changed = {name: f"{here.get(name)} (baseline {old})" for name, old in baseline.environment.items()}
    return found | {f"environment.{n}": text for n, text in changed.items() if here.get(n) != baseline.environment[n]}

"""gsrq regress: gates on an artifact, for CI."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gsrq_export.commands.options import artifact_option, backend_option, open_model, threads_option
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.suite import EvaluationSettings, given_tokens
from gsrq_export.gate.baseline import Gates, save_baseline
from gsrq_export.gate.check import check_artifact
from gsrq_export.gate.junit import write_junit
from gsrq_export.gate.markdown import figure_cells, write_markdown
from gsrq_export.gate.record import record_baseline
from gsrq_export.gate.verdict import GateReport, Verdict
from gsrq_export.stages.progress import make_reporter

COLOURS = {
    Verdict.ACCEPT: "green",
    Verdict.REGRESSION: "red",
    Verdict.ANOMALOUS: "magenta",
    Verdict.INCOMPLETE: "yellow",
}
LIMITS = {
    "confidence": "Of the one-sided bounds and tests.",
    "max_perplexity_increase": "Over the unquantized model: 0.05 allows 5 %.",
    "max_recall_loss": "Of the unquantized model's recall, at each length: 0.05 allows 5 in 100 cases.",
    "perplexity_tolerance": "Over the accepted artifact: less is no worsening.",
    "max_memory_increase": "Of a sequence's cache over the accepted artifact's.",
    "max_perplexity_gain": "Over the unquantized model: more is not believed.",
    "anomaly_confidence": "Of the tests for gains that are too good.",
}

text_option = click.option(
    "--text", "text_file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Held-out text."
)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of Gates."""
    defaults = Gates().model_dump()
    for name, meaning in reversed(LIMITS.items()):
        text = f"{meaning} Default: the baseline's, or {defaults[name]:g} when recording."
        command = click.option(f"--{name.replace('_', '-')}", name, type=float, help=text)(command)
    return command


@click.group()
def regress() -> None:
    """Is an artifact still as good as the one that was accepted?"""


@regress.command("record")
@artifact_option
@text_option
@click.option("--model", required=True, help="The unquantized model: a directory or hub id.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The baseline to write.")
@click.option("--windows", type=int, default=32, show_default=True, help="Perplexity windows at most.")
@click.option("--window-tokens", type=int, default=512, show_default=True)
@click.option(
    "--length", "lengths", type=int, multiple=True, default=(512, 1024), show_default=True, help="Recall; repeatable."
)
@click.option("--cases", type=int, default=128, show_default=True, help="Recall cases a length.")
@click.option("--no-recall", is_flag=True, help="For models that cannot do the task; perplexity alone hides damage.")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows or cases at once.")
@click.option("--seed", type=int, default=0, show_default=True)
@limit_options
@threads_option
@backend_option
def record(
    artifact: Path,
    text_file: Path,
    model: str,
    out: Path,
    windows: int,
    window_tokens: int,
    lengths: tuple[int, ...],
    cases: int,
    no_recall: bool,
    batch: int,
    seed: int,
    threads: int | None,
    backend: str,
    **limits: float | None,
) -> None:
    """Measure the unquantized model and the artifact, and write the baseline if the artifact passes its gates."""
    gates = Gates().override(limits)
    coded = open_model(artifact, threads, backend)
    if no_recall:
        lengths = ()
    for length in lengths:
        if length < 1:
            raise GsrqError(f"--length {length} is below 1", "give a number of tokens")
    if len(set(lengths)) != len(lengths):
        raise GsrqError(f"--length {', '.join(map(str, lengths))}: one is given twice", "give each once")
    settings = EvaluationSettings(
        window_tokens=window_tokens,
        windows=windows,
        prompt_tokens=given_tokens(window_tokens, coded.metadata.exact_prefill),
        recall_lengths=lengths,
        recall_cases=cases,
        batch=batch,
        seed=seed,
    )
    baseline, report = record_baseline(artifact, coded, text_file, model, settings, gates, make_reporter())
    show_report(report)
    if report.verdict is Verdict.ACCEPT:
        save_baseline(out, baseline)
        click.echo(f"baseline: {out}")
    else:
        click.echo(f"{out} is not written: an artifact that fails its own gates cannot be the accepted one", err=True)
        raise SystemExit(report.verdict.value)


@regress.command("check")
@artifact_option
@click.option("--baseline", type=click.Path(path_type=Path, dir_okay=False), required=True, help="What `record` wrote.")
@text_option
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write JUnit XML here.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write a Markdown summary here.")
@limit_options
@threads_option
@backend_option
def check(
    artifact: Path,
    baseline: Path,
    text_file: Path,
    junit: Path | None,
    markdown: Path | None,
    threads: int | None,
    backend: str,
    **limits: float | None,
) -> None:
    """Hold an artifact against a baseline. Exit status 0 ACCEPT, 1 REGRESSION, 3 ANOMALOUS, 4 INCOMPLETE."""
    for option, path in (("artifact", artifact), ("baseline", baseline), ("text", text_file)):
        if not path.exists():
            raise GsrqError(f"--{option} {path} does not exist", "check the path")
    for option, place in (("junit", junit), ("markdown", markdown)):
        if place is not None and not os.access(_existing_parent(place), os.W_OK):
            raise GsrqError(f"--{option} {place} cannot be written", "name a file in a directory that you may write to")
    opener = partial(open_model, threads=threads, backend=backend)
    report = check_artifact(artifact, baseline, text_file, limits, opener, make_reporter())
    show_report(report)
    if junit is not None:
        write_junit(junit, report)
    if markdown is not None:
        write_markdown(markdown, report)
    raise SystemExit(report.verdict.value)


def show_report(report: GateReport) -> None:
    """The gates as a table, the verdict last."""
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("gate", "verdict", "value", "lower", "upper", "limit"):
        table.add_column(
            name, justify="left" if name in ("gate", "verdict") else "right", no_wrap=name != "gate", overflow="fold"
        )
    for result in report.results:
        verdict = Text(result.verdict.name, COLOURS[result.verdict])
        table.add_row(result.name, verdict, *figure_cells(result))
    console.print(table)
    for result in report.results:
        if result.verdict is not Verdict.ACCEPT:
            console.print(Text(f"{result.name}: {result.detail}"), soft_wrap=True)
    console.print(Text(f"verdict: {report.verdict.name}", f"bold {COLOURS[report.verdict]}"))


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())

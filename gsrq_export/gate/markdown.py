"""Markdown of a report, for a CI job's summary."""

from __future__ import annotations

import html
from pathlib import Path

from gsrq_export.gate.verdict import GateReport, GateResult, Verdict, show
from gsrq_export.stages.storage import write_atomic

MARKS = {Verdict.ACCEPT: "✅", Verdict.REGRESSION: "❌", Verdict.ANOMALOUS: "⚠️", Verdict.INCOMPLETE: "❔"}
FIGURES = ("value", "lower", "upper", "limit")


def markdown(report: GateReport) -> str:
    """A heading with the verdict, a table with a row a gate, and what was compared, folded away."""
    lines = [
        f"## {MARKS[report.verdict]} gsrq regress: {report.verdict.name}",
        "",
        f"Artifact `{_cell(report.artifact)}`, {report.seconds:.0f} s.",
        "",
        "| gate | verdict | value | lower | upper | limit | |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for result in report.results:
        cells = [result.name, f"{MARKS[result.verdict]} {result.verdict.name}", *figure_cells(result), result.detail]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if report.properties:
        lines += ["", "<details><summary>What was compared</summary>", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in report.properties.items()]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def figure_cells(result: GateResult) -> list[str]:
    """value, lower, upper and limit to read; empty where a gate has none."""
    return [show(result.figures[name], result.unit) if name in result.figures else "" for name in FIGURES]


def write_markdown(path: Path, report: GateReport) -> None:
    """Whole or not at all."""
    write_atomic(path, lambda file: file.write_text(markdown(report), encoding="utf-8"))


def _cell(text: str) -> str:
    # Backslashes first: a pipe's own escape must stay.
    return html.escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")

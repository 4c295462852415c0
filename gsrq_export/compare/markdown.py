"""compare.md: the comparison to read. Figures are rounded here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsrq_export.compare.metrics import Metric, metrics_of
from gsrq_export.compare.schema import Comparison, Prefill, Row, ServingPoint
from gsrq_export.compare.verdict import POINT, Against, Verdict, require_point, verdicts
from gsrq_export.stages.storage import write_atomic


def write_markdown(path: Path, comparison: Comparison, point: ServingPoint = POINT) -> None:
    """Whole or not at all."""
    text = to_markdown(comparison, point)
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def to_markdown(comparison: Comparison, point: ServingPoint = POINT) -> str:
    """Tables of figures and verdicts, one pair a prefill mode; rows by falling effective bits at ``point``.

    Raises:
        GsrqError: bits were not counted at the serving point.
    """
    require_point(comparison, point)
    protocol = comparison.protocol
    rule, calibration = protocol.rule, protocol.calibration
    lines = [
        f"# Cache quantizers on {protocol.model.id}",
        "",
        f"Rule: {rule.sinks} sinks, window {rule.window}, blocks of {rule.block}, exact tokens in {rule.exact_dtype}. "
        f"Calibration: {calibration.sequences} sequences of {calibration.sequence_length} tokens. "
        f"Made with {comparison.created_by} on {comparison.environment.get('device', 'an unknown device')}.",
        "",
        "Bits are per key or value element: nominal counts codes with scales and norms; effective also exact tokens in "
        "16 bits and, once over all sequences, what tokens share (tokens x sequences). 95 % intervals in brackets.",
    ]
    found = verdicts(comparison, point)
    for prefill in comparison.prefills:
        lines += ["", f"## Prefill {prefill}", "", *_figures(comparison, prefill, point)]
        ours = [verdict for verdict in found if verdict.row.prefill == prefill]
        if ours:
            lines += ["", f"### Ours against the rivals, effective bits at {point.key}", "", *_verdicts(ours)]
    if comparison.skipped:
        rows = [[entry.id, entry.label, entry.reason] for entry in comparison.skipped]
        lines += ["", "## Not measured", "", *table(["id", "method", "why"], rows)]
    return "\n".join(lines) + "\n"


def _figures(comparison: Comparison, prefill: Prefill, point: ServingPoint) -> list[str]:
    chosen = [row for row in comparison.rows if row.prefill == prefill]
    every = [metrics_of(metrics) for metrics in (comparison.unquantized[prefill], *(row.metrics for row in chosen))]
    names = list(dict.fromkeys(metric.name for metrics in every for metric in metrics))
    points = [known.key for known in comparison.protocol.serving]

    def cells(metrics: Sequence[Metric]) -> list[str]:
        found = {metric.name: _cell(metric) for metric in metrics}
        return [found.get(name, "") for name in names]

    rows = [["unquantized", "16", *("16" for _ in points), *cells(every[0])]]
    for row in sorted(chosen, key=lambda row: (-row.effective_bits[point.key], row.id)):
        bits = [f"{row.nominal_bits:.3f}", *(f"{row.effective_bits[key]:.2f}" for key in points)]
        rows.append([_name(row), *bits, *cells(metrics_of(row.metrics))])
    return table(["method", "nominal", *(f"effective {key}" for key in points), *names], rows)


def _verdicts(found: Sequence[Verdict]) -> list[str]:
    header = ["ours", "metric", "rivals with as many bits or more", "not reached", "better with fewer bits"]
    rows = []
    for verdict in found:
        beaten = len(verdict.dearer) - len(verdict.lost_to)
        rows.append(
            [
                f"{verdict.row.id}",
                verdict.metric.name,
                f"at least as good as {'all ' if verdict.holds else ''}{beaten} of {len(verdict.dearer)}"
                if verdict.dearer
                else "none",
                _listed(verdict.lost_to),
                _listed(verdict.undercut_by),
            ]
        )
    note = "In brackets what the paired difference shows with 95 % confidence: that ours is worse, or nothing."
    return [*table(header, rows), "", note]


def _listed(others: Sequence[Against]) -> str:
    return "<br>".join(f"{other.rival.id} ({other.statement})" for other in others) or "-"


def _name(row: Row) -> str:
    text = f"{row.id}: {row.label}"
    return f"**{text}**" if row.ours else text


def _cell(metric: Metric) -> str:
    digits = 3 if metric.better == "lower" else 2
    text = f"{metric.value:.{digits}f}"
    if metric.interval is None:
        return text
    return f"{text} [{metric.interval[0]:.{digits}f}, {metric.interval[1]:.{digits}f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]

"""report.html: one page, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gsrq_export.evaluate.recall import LengthRecall, Rate
from gsrq_export.evaluate.suite import Evaluation, require_finite
from gsrq_export.report.schema import BuildMetrics, CacheSize, Distortion
from gsrq_export.report.svg import Series, bars, heatmap, lines

KINDS = ("key", "value")


def write_report(
    path: Path, metrics: BuildMetrics, built: Mapping[str, object], provenance: Mapping[str, object]
) -> None:
    """Render the page.

    Args:
        built: what was built, in the order to show: model, recipe, traffic, cache rule, ...
        provenance: hashes, versions, environment.
    Raises:
        GsrqError: a metric is NaN or infinite.
    """
    require_finite(asdict(metrics), "metrics")
    environment = Environment(
        loader=PackageLoader("gsrq_export.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html.j2").render(
        m=metrics,
        built=built,
        provenance=provenance,
        tokens=_tokens,
        size=_size,
        rate=_rate,
        recall_rows=_recall_rows(metrics),
        **_charts(metrics),
    )
    path.write_text(page, "utf-8")


def _charts(metrics: BuildMetrics) -> dict[str, Any]:
    charts: dict[str, Any] = {}
    if metrics.sizes:
        charts["bits_chart"] = lines(
            "Bits an element against context length",
            "tokens in the context",
            [_tokens(size.context_tokens) for size in metrics.sizes],
            [
                Series("effective", "coded", [size.effective_bits for size in metrics.sizes]),
                Series("without codebooks", "value", [_sequence_bits(size) for size in metrics.sizes]),
                Series("nominal", "nominal", [metrics.nominal_bits] * len(metrics.sizes)),
            ],
            log=True,
        )
    if metrics.coded and metrics.coded["recall"]:
        charts["recall_chart"] = _recall_chart(metrics.exact, metrics.coded)
    if metrics.distortion:
        charts |= _codebook_charts(metrics.distortion)
    return charts


def _recall_chart(exact: Evaluation | None, coded: Evaluation) -> Markup:
    series = []
    ticks: list[str] = []
    for label, evaluation in (("exact", exact), ("coded", coded)):
        if evaluation is None or evaluation["recall"] is None:
            continue
        rows = evaluation["recall"]["lengths"]
        ticks = [_tokens(row["tokens"]) for row in rows]
        intervals = [row["interval"] or [0.0, 1.0] for row in rows]
        series.append(
            Series(
                label,
                label,
                [row["rate"] or 0.0 for row in rows],
                [interval[0] for interval in intervals],
                [interval[1] for interval in intervals],
            )
        )
    return bars("Recall by context length", "tokens in the context", ticks, series, top=1.0)


def _codebook_charts(distortion: list[Distortion]) -> dict[str, Any]:
    by_kind = {kind: [d for d in distortion if d.kind == kind] for kind in KINDS}
    present = [kind for kind in KINDS if by_kind[kind]]
    stages = max(len(d.relative_mse_by_stage) for d in distortion)
    layers = sorted({d.layer for d in distortion})
    by_stage, by_layer = [], []
    for kind in present:
        entries = by_kind[kind]
        # Layers may differ in their number of stages: a stage's mean is over those that have it.
        columns = [
            [d.relative_mse_by_stage[r] for d in entries if r < len(d.relative_mse_by_stage)] for r in range(stages)
        ]
        by_stage.append(Series(f"{kind}s", kind, [sum(column) / len(column) for column in columns if column]))
        last = {d.layer: d.relative_mse_by_stage[-1] for d in entries}
        by_layer.append(Series(f"{kind}s", kind, [last.get(layer, 0.0) for layer in layers]))
    return {
        "stage_chart": lines("Error after each stage", "stage", [str(r + 1) for r in range(stages)], by_stage),
        "layer_chart": bars("Error by layer", "layer", [str(layer) for layer in layers], by_layer),
        "usage_charts": [
            (
                kind,
                heatmap(
                    f"Codewords used, {kind}s", "stage", [(f"{d.layer}", d.usage_by_stage) for d in by_kind[kind]], kind
                ),
            )
            for kind in present
        ],
    }


def _recall_rows(metrics: BuildMetrics) -> list[tuple[str, LengthRecall]]:
    found = []
    for label, evaluation in (("exact", metrics.exact), ("coded", metrics.coded)):
        if evaluation and evaluation["recall"]:
            found += [(label, row) for row in evaluation["recall"]["lengths"]]
    return sorted(found, key=lambda item: item[1]["tokens"])


def _sequence_bits(size: CacheSize) -> float:
    return 16 * (size.code_bytes + size.exact_bytes) / size.plain_bytes


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.3g} GiB"


def _rate(rate: Rate) -> str:
    return "none" if rate["rate"] is None else f"{rate['rate']:.2f} ({rate['correct']}/{rate['cases']})"

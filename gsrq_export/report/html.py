"""report.html and its like: one page, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gsrq_export.evaluate.recall import LengthRecall, Rate
from gsrq_export.evaluate.suite import require_finite
from gsrq_export.report.charts import (
    codebook_figures,
    paid_back_from,
    rate_figures,
    recall_figures,
    sequence_bits,
    serving,
    serving_of,
    shared_point,
    size,
    size_figures,
    tokens,
)
from gsrq_export.report.schema import BuildMetrics, RatePoint
from gsrq_export.report.svg import number

FIDELITY = {
    "top1_agreement": "most likely token the same, share of tokens",
    "kl": "KL divergence of the next token, nats",
    "agreed_tokens": "tokens written before the first that differs",
}


def render(template: str, **values: object) -> str:
    """A page of this package's templates; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("gsrq_export.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


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
    page = render(
        "report.html.j2",
        m=metrics,
        built=built,
        provenance=provenance,
        tokens=tokens,
        size=size,
        number=number,
        rate=_rate,
        interval=_interval,
        bits=bits,
        sequence_bits=sequence_bits,
        paid_back_from=paid_back_from,
        rate_figures=rate_figures(metrics.rates, metrics.exact),
        rate_point=shared_point(metrics.rates),
        serving=serving,
        serving_of=serving_of,
        rate_header=(header := _rate_header(metrics.rates)),
        rate_rows=[_rate_row(point, header) for point in metrics.rates],
        recall_figures=recall_figures(metrics.exact, metrics.coded),
        recall_rows=_recall_rows(metrics),
        task_rows=_task_rows(metrics),
        fidelity_rows=_fidelity_rows(metrics),
        codebook_figures=codebook_figures(metrics),
        size_figures=size_figures(metrics.sizes, metrics.nominal_bits),
    )
    path.write_text(page, "utf-8")


def bits(value: float) -> str:
    shown = number(value)
    return f"{shown} bit{'' if shown == '1' else 's'}"


Header = dict[str, list[str]]  # what the rows of a comparison have, by part


def _rate_header(rates: list[RatePoint]) -> Header:
    def seen(names: list[list[str]]) -> list[str]:
        return list(dict.fromkeys(name for row in names for name in row))

    return {
        "effective": sorted(seen([list(r.effective_bits) for r in rates]), key=serving_of),
        "perplexity": seen([list(r.perplexity_ratio) for r in rates]),
        "recall": sorted(seen([[str(row.tokens) for row in r.recall] for r in rates]), key=int),
        "kl": ["KL"] if any(r.kl is not None for r in rates) else [],
        "tasks": seen([list(r.tasks or {}) for r in rates]),
    }


def _rate_row(point: RatePoint, header: Header) -> list[str]:
    """The cells after the name, "-" where the row was not measured."""
    recall = {str(row.tokens): f"{row.rate:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in point.recall}
    effective = {n: f"{bits:.2f}" for n, bits in point.effective_bits.items()}
    perplexity = {name: f"{100 * (ratio - 1):+.2f} %" for name, ratio in point.perplexity_ratio.items()}
    kl = {} if point.kl is None else {"KL": number(point.kl)}
    tasks = {name: f"{score:.2f}" for name, score in (point.tasks or {}).items()}
    found = {"effective": effective, "perplexity": perplexity, "recall": recall, "kl": kl, "tasks": tasks}
    cells = [found[part].get(name, "-") for part, names in header.items() for name in names]
    return [f"{point.nominal_bits:.3g}", point.prefill, *cells]


def _recall_rows(metrics: BuildMetrics) -> list[tuple[str, LengthRecall]]:
    found = []
    for label, evaluation in (("exact", metrics.exact), ("coded", metrics.coded)):
        if evaluation and evaluation["recall"]:
            found += [(label, row) for row in evaluation["recall"]["lengths"]]
    return sorted(found, key=lambda item: item[1]["tokens"])


def _task_rows(metrics: BuildMetrics) -> list[dict[str, Any]]:
    """A row a task and length: exact beside coded and their difference; evaluations made without tasks have none."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    parts = {"exact": metrics.exact, "coded": metrics.coded, "change": metrics.comparison}
    for label, evaluation in parts.items():
        part: Mapping[str, Any] = evaluation or {}
        for entry in part.get("tasks") or ():
            row = rows.setdefault((entry["task"], entry["tokens"]), {"task": entry["task"], "tokens": entry["tokens"]})
            row[label] = entry
    return [{**dict.fromkeys(parts), **row} for row in rows.values()]


def _fidelity_rows(metrics: BuildMetrics) -> list[tuple[str, float, list[float] | None]]:
    """(name, mean, interval) of each measure, where the comparison has this part."""
    part: Mapping[str, Any] = metrics.comparison or {}
    return [
        (FIDELITY.get(name, name.replace("_", " ")), float(value["mean"]), value.get("interval"))
        for name, value in (part.get("fidelity") or {}).items()
        if isinstance(value, Mapping) and "mean" in value
    ]


def _rate(rate: Rate) -> str:
    return "none" if rate["rate"] is None else f"{rate['rate']:.2f} ({rate['correct']}/{rate['cases']})"


def _interval(interval: list[float] | None, digits: int = 2) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else "none"

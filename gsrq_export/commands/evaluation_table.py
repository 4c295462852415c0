"""What `gsrq eval` prints: a row a figure, a column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from gsrq_export.evaluate.fidelity import FidelityMetrics
from gsrq_export.evaluate.harness import HarnessEvaluation, HarnessMetric
from gsrq_export.evaluate.suite import Comparison, Evaluation


def evaluation_table(data: Mapping[str, Any], backend: str) -> Table:
    """Perplexity, recall, tasks and fidelity.

    Args:
        data: "coded", an `Evaluation`; with "exact" and "comparison" where it was compared.
    """
    found: dict[str, Evaluation] = {name: data[name] for name in ("exact", "coded") if name in data}
    comparison: Comparison | None = data.get("comparison")
    table = Table(title=f"95 % intervals in brackets; coded by {backend}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    if comparison is not None:
        table.add_column("coded - exact", justify="right")
    rows = [f["perplexity"] for f in found.values()]
    loss = [f"{100 * (comparison['perplexity_ratio'] - 1):+.2f} %"] if comparison else []
    cells = (_value(r["perplexity"], r["interval"], 3) for r in rows)
    table.add_row(f"perplexity, {rows[0]['scored_tokens']} tokens", *cells, *loss)
    recalls = [f["recall"]["lengths"] if f["recall"] else [] for f in found.values()]
    for row in zip(*recalls, strict=True):
        table.add_row(
            f"recall at {row[0]['tokens']}, {row[0]['cases']} cases", *(_rate(r["rate"], r["interval"]) for r in row)
        )
        for depth in row[0]["by_depth"]:
            depths = [r["by_depth"][depth] for r in row]
            table.add_row(f"  {depth}", *(_rate(d["rate"], d["interval"]) for d in depths))
    for i, tasks in enumerate(zip(*(f.get("tasks", []) for f in found.values()), strict=True)):
        label = f"{tasks[0]['task']} at {tasks[0]['tokens']}, {tasks[0]['cases']} cases"
        lost = comparison["tasks"][i] if comparison else None
        change = [f"{lost['difference']:+.2f} [{lost['interval'][0]:+.2f}, {lost['interval'][1]:+.2f}]"] if lost else []
        table.add_row(label, *(_value(t["score"], t["interval"]) for t in tasks), *change)
    if comparison is not None and "fidelity" in comparison:
        _add_fidelity(table, comparison["fidelity"])
    return table


def harness_table(found: Mapping[str, HarnessEvaluation], backend: str) -> Table:
    """lm-eval's figures with its standard errors; ``found`` is by column."""
    first = next(iter(found.values()))
    table = Table(title=f"lm-eval {first['lm_eval']}, with its standard errors; coded by {backend}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for task, row in first["results"].items():
        label = f"{task}, {row['samples']} documents" if row["samples"] is not None else task
        for metric in row["metrics"]:
            cells = [_with_error(f["results"][task]["metrics"][metric]) for f in found.values()]
            table.add_row(f"{label}: {metric}", *cells)
    if any(f["truncated"] for f in found.values()):
        table.add_row("requests whose context lost its start", *(str(f["truncated"]) for f in found.values()))
    return table


def _with_error(metric: HarnessMetric) -> str:
    error = metric["stderr"]
    return f"{metric['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _add_fidelity(table: Table, found: FidelityMetrics) -> None:
    label = f"{found['prompts']} continuations of {found['new_tokens']} tokens:"
    table.add_row(label)
    for name, part, digits in (
        ("same most likely token", found["top1_agreement"], 4),
        ("KL, nats a token", found["kl"], 5),
        ("tokens until it departs", found["agreed_tokens"], 1),
    ):
        table.add_row(f"  {name}", "", _value(part["mean"], part["interval"], digits))


def _value(value: float, interval: Sequence[float], digits: int = 2) -> str:
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _rate(rate: float | None, interval: list[float] | None) -> str:
    return "no case" if rate is None or interval is None else _value(rate, interval)

"""gsrq eval: perplexity and recall of an artifact, beside the model it was built from."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from gsrq_export.commands.options import artifact_option, backend_option, open_model, threads_option
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.suite import Evaluation, EvaluationSettings, compare, given_tokens
from gsrq_export.evaluate.suite import evaluate as run_evaluation
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.gate.measure import read_text
from gsrq_export.model.loading import load_original, model_directory
from gsrq_export.runtime.generate import load_tokenizer
from gsrq_export.stages.progress import make_reporter
from gsrq_export.stages.storage import write_atomic


@click.command("eval")
@artifact_option
@click.option(
    "--text", "text_file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Held-out text."
)
@click.option("--model", help="The unquantized model, to compare with: a directory or hub id.")
@click.option("--windows", type=int, default=8, show_default=True, help="Perplexity windows at most.")
@click.option("--window-tokens", type=int, default=1024, show_default=True)
@click.option("--length", "lengths", type=int, multiple=True, help="Recall at this many tokens; may be repeated.")
@click.option("--cases", type=int, default=24, show_default=True, help="Recall cases a length.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here too."
)
@threads_option
@backend_option
def evaluate(
    artifact: Path,
    text_file: Path,
    model: str | None,
    windows: int,
    window_tokens: int,
    lengths: tuple[int, ...],
    cases: int,
    seed: int,
    json_file: Path | None,
    threads: int | None,
    backend: str,
) -> None:
    """Measure an artifact through ONNX Runtime, as it is deployed."""
    text, _ = read_text(text_file)
    coded = open_model(artifact, threads, backend)
    settings = EvaluationSettings(
        window_tokens=window_tokens,
        windows=windows,
        prompt_tokens=given_tokens(window_tokens, coded.metadata.exact_prefill),
        recall_lengths=lengths,
        recall_cases=cases,
        seed=seed,
    )
    tokenizer = load_tokenizer(artifact)
    found: dict[str, Evaluation] = {}
    reporter = make_reporter()
    if model is not None:
        exact = load_original(model, model_directory(model), tokenizer)
        with reporter.task("exact: windows and cases", settings.steps) as task:
            found["exact"] = run_evaluation(TorchRunner(exact), tokenizer, text, settings, task.advance)
    with reporter.task("coded: windows and cases", settings.steps) as task:
        found["coded"] = run_evaluation(OrtRunner(coded), tokenizer, text, settings, task.advance)
    Console().print(_table(found, coded.backend))
    if json_file is not None:
        data: dict[str, object] = dict(found)
        if "exact" in found:
            data["comparison"] = compare(found["exact"], found["coded"])
        write_atomic(json_file, lambda path: path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n"))


def _table(found: dict[str, Evaluation], backend: str) -> Table:
    table = Table(title=f"95 % intervals in brackets; coded by {backend}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    rows = [f["perplexity"] for f in found.values()]
    cells = (f"{r['perplexity']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" for r in rows)
    table.add_row(f"perplexity, {rows[0]['scored_tokens']} tokens", *cells)
    recalls = [f["recall"]["lengths"] if f["recall"] else [] for f in found.values()]
    for row in zip(*recalls, strict=True):
        table.add_row(
            f"recall at {row[0]['tokens']}, {row[0]['cases']} cases", *(_rate(r["rate"], r["interval"]) for r in row)
        )
        for depth in row[0]["by_depth"]:
            depths = [r["by_depth"][depth] for r in row]
            table.add_row(f"  {depth}", *(_rate(d["rate"], d["interval"]) for d in depths))
    return table


def _rate(rate: float | None, interval: list[float] | None) -> str:
    return "no case" if rate is None or interval is None else f"{rate:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"

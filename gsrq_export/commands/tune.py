"""gsrq tune: a recipe whose budgets were searched by measurement, for a target of bits or memory."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import click

from gsrq_export.build.source import Source
from gsrq_export.commands.build import spooled
from gsrq_export.commands.options import device_option
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import load_recipe
from gsrq_export.stages.engine import Pipeline
from gsrq_export.stages.progress import make_reporter
from gsrq_export.stages.storage import disk_errors, write_atomic
from gsrq_export.tune.measure import Meter
from gsrq_export.tune.search import Search, ladder_bits
from gsrq_export.tune.settings import EFFORTS
from gsrq_export.tune.stages import Plan, measures_in, read_book, read_traffic, split, tune_stages
from gsrq_export.tune.target import make_target, parse_memory
from gsrq_export.tune.write import Report, page, recipe_text, report_data


@click.command()
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--bits", type=click.FloatRange(0, 16, min_open=True), help="Effective bits an element to aim at.")
@click.option("--memory", help="Or bytes of all caches together, such as 1GB or 512MiB.")
@click.option("--context", type=click.IntRange(1), required=True, help="Tokens in each sequence's cache.")
@click.option(
    "--sequences", type=click.IntRange(1), default=1, show_default=True, help="Sequences that share the codebooks."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The recipe to write.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Intermediate files; default: OUT.work.")
@click.option("--effort", type=click.Choice(list(EFFORTS)), default="quick", show_default=True)
@device_option
def tune(
    recipe_file: Path,
    bits: float | None,
    memory: str | None,
    context: int,
    sequences: int,
    out: Path,
    work: Path | None,
    effort: str,
    device: str,
) -> None:
    """Search every layer's budgets, sinks and window for a target; write a recipe, and beside it .json and .html."""
    if (bits is None) == (memory is None):
        raise GsrqError("--bits and --memory: give one of the two", "name the effective bits or the memory to aim at")
    if out.suffix not in (".yaml", ".yml"):
        raise GsrqError(f"--out {out}: not a recipe's name", "end it with .yaml")
    given = load_recipe(recipe_file)
    source = Source(given, device)
    source.check(whole_for="gsrq tune")
    layers = source.shapes()
    target = make_target(given, layers, context, sequences, bits, parse_memory(memory) if memory is not None else None)
    work = work or out.with_name(f"{out.name}.work")
    recipe, reporter = spooled(given, work), make_reporter()
    started = time.monotonic()
    plan = Plan.make(recipe, EFFORTS[effort], ladder_bits(recipe, layers, target), device)
    done = Pipeline(work, tune_stages(plan), reporter).run()
    measured = time.monotonic()
    ids, answers = read_traffic(done["traffic"], plan.source.tokenizer)
    parts, ladders = split(answers, plan.effort), measures_in(done["sensitivity"])
    books = {ladder: read_book(done["ladders"], *ladder) for ladder in ladders}
    rows = parts.compared
    int8, spec = recipe.codec.codewords == "int8", plan.source.spec  # the spec before the model is moved
    meter = Meter(plan.source.placed_model, spec, ids[rows], answers[rows], recipe.codec.beam, int8)
    result = Search(recipe, layers, target, books, ladders, meter).run(reporter)
    # Standard input was read into the work directory, and is still to be read by who builds the recipe.
    best = replace(result.best, recipe=result.best.recipe.model_copy(update={"traffic": given.traffic}))
    report = Report(given, target, effort, plan.effort, parts, ladders, replace(result, best=best), device)
    seconds = {"stages": measured - started, "search": time.monotonic() - measured}
    text, data, html = recipe_text(report), json.dumps(report_data(report, seconds), indent=1) + "\n", page(report)
    with disk_errors("tuned recipe", out.parent.absolute()):
        for path, content in ((out.with_suffix(".json"), data), (out.with_suffix(".html"), html), (out, text)):
            write_atomic(path, lambda file, content=content: file.write_text(content, "utf-8"))  # type: ignore[misc]
    size, found = best.size, best.measured
    reporter.line(f"{best.name}: {size.effective_bits:.3f} effective bits, {size.total:,} bytes, KL {found.kl:.4g}")
    reporter.line(f"recipe: {out}")

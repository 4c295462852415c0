"""gsrq compare: every cache quantizer beside ours, on the user's model and traffic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import torch

from gsrq_export.baselines.methods import chosen
from gsrq_export.build.source import Source
from gsrq_export.commands.build import spooled
from gsrq_export.compare.markdown import write_markdown
from gsrq_export.compare.recipe import ours_of_artifact, settings_of_recipe, subject_of_recipe
from gsrq_export.compare.run import run_comparison
from gsrq_export.compare.schema import SERVING, Prefill, load_comparison
from gsrq_export.compare.subject import EvaluationText, perplexity_only
from gsrq_export.compare.verdict import POINT
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.suite import EvaluationSettings
from gsrq_export.gate.measure import read_text
from gsrq_export.recipe import load_recipe
from gsrq_export.stages.progress import make_reporter

JSON_FILE, MARKDOWN_FILE = "compare.json", "compare.md"
MODES: dict[str, list[Prefill]] = {"coded": ["coded"], "exact": ["exact"], "both": ["coded", "exact"]}
directory = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--out", type=directory, required=True, help=f"Gets {JSON_FILE} and {MARKDOWN_FILE}.")
@click.option(
    "--methods", default="all", show_default=True, help="Rivals' ids with commas between; see docs/baselines.md."
)
@click.option("--artifact", type=directory, help="Take ours from it; default: train by the recipe's codec section.")
@click.option(
    "--prefix",
    "prefixes",
    type=click.FloatRange(0, 1, True, True),
    multiple=True,
    help="Also this share of our stages; may be repeated.",
)
@click.option("--prefill", type=click.Choice(list(MODES)), help="Default: the recipe's.")
@click.option("--work", type=directory, help="Intermediate files, a build's or new ones; default: OUT.work.")
@click.option("--device", help="cpu, cuda, cuda:1; default: cuda where there is one.")
@click.option("--text", "named", multiple=True, help="NAME=FILE in the place of the recipe's text; may be repeated.")
@click.option("--sequences", type=click.IntRange(1), help="Calibration sequences; default: the recipe's.")
@click.option("--windows", type=click.IntRange(1), help="Perplexity windows of a text; default: the recipe's.")
@click.option("--window-tokens", type=click.IntRange(2), help="Tokens of a window; default: the recipe's.")
@click.option("--length", "lengths", type=click.IntRange(2), multiple=True, help="Recall at; default: the recipe's.")
@click.option("--cases", type=click.IntRange(1), help="Recall cases a length; default: the recipe's.")
@click.option("--iterations", type=click.IntRange(1), help="Of the rivals' clusterings; default: each one's own.")
@click.option(
    "--at",
    default=POINT.key,
    show_default=True,
    type=click.Choice([p.key for p in SERVING]),
    help="Serving point of the verdict: tokens x sequences.",
)
def compare(
    recipe_file: Path,
    out: Path,
    methods: str,
    artifact: Path | None,
    prefixes: tuple[float, ...],
    prefill: str | None,
    work: Path | None,
    device: str | None,
    named: tuple[str, ...],
    sequences: int | None,
    windows: int | None,
    window_tokens: int | None,
    lengths: tuple[int, ...],
    cases: int | None,
    iterations: int | None,
    at: str,
) -> None:
    """Measure rival cache quantizers and ours under one rule, on the recipe's model and traffic.

    Started again it goes on: rows that are in OUT are kept.
    """
    rivals = chosen([id.strip() for id in methods.split(",") if id.strip()], iterations)
    recipe = load_recipe(recipe_file)
    settings = _overridden(settings_of_recipe(recipe), windows, window_tokens, lengths, cases)
    texts = _texts(named, settings)
    if sequences is not None:
        recipe = recipe.model_copy(update={"traffic": recipe.traffic.model_copy(update={"sequences": sequences})})
    place = _device(device)
    if (out / JSON_FILE).exists():
        load_comparison(out / JSON_FILE)  # refused before anything runs if it is not one
    work = work or out.with_name(f"{out.name}.work")
    source = Source(spooled(recipe, work))
    source.check(whole_for="gsrq compare")
    reporter = make_reporter()
    ours = ours_of_artifact(artifact, source) if artifact is not None else None
    subject, trained = subject_of_recipe(source, work, place, ours is None, texts, settings, reporter)
    row = ours or trained
    assert row is not None
    rows = [row, *(row.prefix(share) for share in prefixes)]
    found = run_comparison(out / JSON_FILE, subject, rivals, rows, MODES[prefill or recipe.cache.prefill], reporter)
    point = next(point for point in SERVING if point.key == at)
    write_markdown(out / MARKDOWN_FILE, found, point)
    reporter.line(f"comparison: {out / MARKDOWN_FILE}")


def _overridden(
    settings: EvaluationSettings,
    windows: int | None,
    window_tokens: int | None,
    lengths: tuple[int, ...],
    cases: int | None,
) -> EvaluationSettings:
    return replace(
        settings,
        prompt_tokens=1,  # each prefill mode's own is put in its place
        windows=windows or settings.windows,
        window_tokens=window_tokens or settings.window_tokens,
        recall_lengths=lengths or settings.recall_lengths,
        recall_cases=cases or settings.recall_cases,
    )


def _texts(named: tuple[str, ...], settings: EvaluationSettings) -> list[EvaluationText] | None:
    """The texts of --text; the first carries all that is measured, the others perplexity."""
    texts: list[EvaluationText] = []
    for entry in named:
        name, separator, file = entry.partition("=")
        if not (name and separator and file) or name in {text.name for text in texts}:
            raise GsrqError(f"--text {entry}: not NAME=FILE, or a name that was given before", "use novels=novels.txt")
        content, _ = read_text(Path(file))
        texts.append(EvaluationText(name, content, perplexity_only(settings) if texts else settings))
    return texts or None


def _device(asked: str | None) -> str:
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise GsrqError(
            f"--device {asked}: {str(error).splitlines()[0]}", "use cpu, or cuda on a machine that has it"
        ) from None
    return asked

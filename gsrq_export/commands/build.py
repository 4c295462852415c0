"""gsrq build: from a recipe to an artifact."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gsrq_export.accounting import contexts, footprint, nominal_bits
from gsrq_export.artifact.publish import check_destination
from gsrq_export.build.agreement import check_distributed
from gsrq_export.build.package import budgets, publish_artifact
from gsrq_export.build.source import Source
from gsrq_export.build.stages import stages
from gsrq_export.build.tiny import tiny_recipe
from gsrq_export.commands.options import device_option
from gsrq_export.distributed.group import joined, local_device
from gsrq_export.distributed.world import ALONE, World
from gsrq_export.recipe import Recipe, StdinSource, load_recipe
from gsrq_export.recipe_files import find_recipe
from gsrq_export.stages.engine import Pipeline
from gsrq_export.stages.progress import make_reporter, quiet_reporter
from gsrq_export.traffic.sources import spool_stdin


@click.command()
@click.option("--recipe", "recipe_file", required=True, help="A YAML file, or the name of a recipe that comes along.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The artifact's directory."
)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Intermediate files; default: OUT.work.")
@device_option
@click.option("--dry-run", is_flag=True, help="Print the plan, sizes and effective bits; run and write nothing.")
@click.option(
    "--tiny", is_flag=True, help="On a small random model of the recipe's architecture: a trial of seconds, no weights."
)
@click.option(
    "--parallel",
    type=click.Choice(["codebooks", "rows"]),
    default="codebooks",
    show_default=True,
    help="What the processes of torchrun share: whole codebooks, or the rows that each is trained on, where a layer's "
    "do not fit one process. Either gives what one process gives; see docs/distributed.md.",
)
def build(
    recipe_file: str, out: Path, work: Path | None, device: str, dry_run: bool, tiny: bool, parallel: str
) -> None:
    """Build the artifact of a recipe. Killed and started again it goes on; what did not change is not run again.

    Under torchrun (torchrun --nproc-per-node N -m gsrq_export build ...) N processes calibrate.
    """
    recipe = load_recipe(find_recipe(recipe_file))
    work = work or out.with_name(f"{out.name}.work")
    if dry_run and os.environ.get("RANK", "0") != "0":
        return
    with contextlib.ExitStack() as stack:
        device = local_device(device)
        world = ALONE if dry_run else stack.enter_context(joined(device))
        if tiny:
            check_destination(out)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) if dry_run else work
            with world.first():
                recipe = tiny_recipe(recipe, scratch.absolute())
        _build(out, work, Source(recipe, device, parallel), dry_run, world)


def _build(out: Path, work: Path, source: Source, dry_run: bool, world: World) -> None:
    recipe = source.recipe
    source.check()
    check_destination(out)
    reporter = quiet_reporter() if world.rank else make_reporter()
    if dry_run:
        click.echo(describe(source))
        if any(isinstance(text, StdinSource) for text in recipe.texts):
            click.echo("stages     not planned: they depend on what standard input will hold")
            return
        for planned in Pipeline(work, stages(source), reporter).plan():
            click.echo(f"{planned.name:<10} {planned.status:<8} {planned.directory}")
        return
    if world.size > 1:
        check_distributed(source, world)
    elif any(isinstance(text, StdinSource) for text in recipe.texts):
        source = replace(source, recipe=spooled(recipe, work))
    done = Pipeline(work, stages(source), reporter, world).run()
    if world.rank:
        return
    publish_artifact(source, done, out)
    reporter.line(f"artifact: {out}")


def spooled(recipe: Recipe, work: Path) -> Recipe:
    """The recipe with standard input replaced by a file in ``work``, so that it can be hashed and read again."""

    def file(text: Any) -> Any:
        return spool_stdin(text, work) if isinstance(text, StdinSource) else text

    traffic = recipe.traffic.model_copy(update={"sources": tuple(map(file, recipe.traffic.sources))})
    evaluate = recipe.evaluate and recipe.evaluate.model_copy(update={"text": file(recipe.evaluate.text)})
    return recipe.model_copy(update={"traffic": traffic, "evaluate": evaluate})


def describe(source: Source) -> str:
    """The plan in figures: bits and bytes by context length."""
    recipe, shapes = source.recipe, source.shapes()
    codec = recipe.codec
    heads = f"{shapes[0].num_kv_heads} KV heads of {shapes[0].head_dim}"
    lines = [
        f"model      {source.directory} ({len(shapes)} layers, {heads})",
        f"weights    {source.residence}",
        f"traffic    {recipe.traffic.sequences} sequences of {recipe.traffic.sequence_length} tokens",
        f"codec      {codec.method}, metric {codec.metric}, {nominal_bits(recipe, shapes):g} nominal bits",
        f"keys       {budgets(recipe, 'key', len(shapes))}",
        f"values     {budgets(recipe, 'value', len(shapes))}",
        "context    effective bits   cache bytes   16-bit cache   times smaller",
    ]
    for context in contexts(recipe.export.max_length):
        size = footprint(recipe, shapes, context)
        lines.append(
            f"{context:>7}    {size.effective_bits:>14.2f}   {size.per_sequence:>11,}   {size.fp16:>12,}   "
            f"{size.fp16 / size.per_sequence:>13.1f}"
        )
    lines.append(f"           (effective bits count {footprint(recipe, shapes, 1).codebooks:,} bytes of codebooks,")
    lines.append("           which all sequences share; the bytes and the ratio are of one sequence without them)")
    return "\n".join(lines)

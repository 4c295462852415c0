"""gsrq recipes: what comes along, what it costs, and whether a recipe is sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from gsrq_export.accounting import LayerShape, contexts, footprint, nominal_bits, token_bytes
from gsrq_export.build.package import budgets
from gsrq_export.build.source import Source, check_stated
from gsrq_export.commands.build import describe
from gsrq_export.recipe import Recipe, load_recipe
from gsrq_export.recipe_files import bundled_recipes, find_recipe

SHARED_BY = 32  # sequences, where the codebooks' share is shown


@click.group()
def recipes() -> None:
    """List, show and validate recipes."""


@recipes.command("list")
def list_recipes() -> None:
    """The recipes that come with the package, with the bytes a token of theirs takes."""
    for file in bundled_recipes():
        recipe = load_recipe(file)
        size = ""
        if recipe.model.architecture is not None:
            shapes = Source(recipe).stated_shapes()
            size = f"; {token_bytes(recipe, shapes):,} bytes a token, bf16 {footprint(recipe, shapes, 1).fp16:,}"
        click.echo(f"{file}\n    {recipe.nominal_bits:g} bits, model {recipe.model.path}{size}")


@recipes.command("show")
@click.argument("recipe_file", metavar="RECIPE")
def show(recipe_file: str) -> None:
    """What a recipe's cache takes by context length: a YAML file, or the name of one that comes along.

    A recipe that states its model's architecture is shown without the model.
    """
    recipe = load_recipe(find_recipe(recipe_file))
    check_stated(recipe)
    click.echo(memory(recipe, Source(recipe).stated_shapes()))


@recipes.command("validate")
@click.argument("files", type=click.Path(path_type=Path, dir_okay=False), nargs=-1, required=True)
@click.option("--no-model", is_flag=True, help="Do not look at the model that the recipe names.")
def validate(files: tuple[Path, ...], no_model: bool) -> None:
    """Check recipes: every key, every value, and that the model can follow them."""
    for file in files:
        recipe = load_recipe(file)
        if no_model:
            check_stated(recipe)
            click.echo(f"{file}: sound; the model was not looked at")
        else:
            source = Source(recipe)
            source.check()
            click.echo(f"{file}: sound\n{describe(source)}")


def memory(recipe: Recipe, shapes: Sequence[LayerShape]) -> str:
    """Bytes a token and by context length, beside bf16 and FP8, and the codebooks."""
    one = footprint(recipe, shapes, 1)
    heads = f"{shapes[0].num_kv_heads} KV heads of {shapes[0].head_dim}"
    lines = [
        f"{recipe.name}: {recipe.model.path}, {len(shapes)} layers, {heads}",
        f"keys       {budgets(recipe, 'key', len(shapes))}",
        f"values     {budgets(recipe, 'value', len(shapes))}",
        f"a token    {token_bytes(recipe, shapes):,} bytes coded, {nominal_bits(recipe, shapes):g} bits an element; "
        f"bf16 {one.fp16:,}, FP8 {one.fp16 // 2:,}",
        f"codebooks  {one.codebooks:,} bytes, shared by all sequences",
        "context        bf16 bytes       FP8 bytes     coded bytes   effective bits, 1 sequence   "
        f"{SHARED_BY} sequences",
    ]
    for context in contexts(recipe.export.max_length):
        size, many = footprint(recipe, shapes, context), footprint(recipe, shapes, context, SHARED_BY)
        lines.append(
            f"{context:>7}  {size.fp16:>16,}{size.fp16 // 2:>16,}{size.per_sequence:>16,}   "
            f"{size.effective_bits:>26.2f}   {many.effective_bits:>12.2f}"
        )
    lines.append("coded bytes: codes and exact slots of one sequence; effective bits count the codebooks too")
    return "\n".join(lines)

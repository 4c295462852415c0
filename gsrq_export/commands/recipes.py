"""gsrq recipes: what comes along, and whether a recipe is sound."""

from __future__ import annotations

from pathlib import Path

import click

from gsrq_export.build.source import Source
from gsrq_export.commands.build import describe
from gsrq_export.recipe import asset_roots, load_recipe


@click.group()
def recipes() -> None:
    """List and validate recipes."""


@recipes.command("list")
def list_recipes() -> None:
    """The recipes that come with the package."""
    for file in sorted(f for root in asset_roots() for f in (root / "recipes").glob("*.yaml")):
        recipe = load_recipe(file)
        click.echo(f"{file}\n    {recipe.nominal_bits:g} bits, model {recipe.model.path}")


@recipes.command("validate")
@click.argument("files", type=click.Path(path_type=Path, dir_okay=False), nargs=-1, required=True)
@click.option("--no-model", is_flag=True, help="Do not look at the model that the recipe names.")
def validate(files: tuple[Path, ...], no_model: bool) -> None:
    """Check recipes: every key, every value, and that the model can follow them."""
    for file in files:
        recipe = load_recipe(file)
        if no_model:
            click.echo(f"{file}: sound; the model was not looked at")
        else:
            source = Source(recipe)
            source.check()
            click.echo(f"{file}: sound\n{describe(source)}")

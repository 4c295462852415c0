"""Budgets: a width and a number of stages for every layer's keys and values, their bytes, recipes that have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gsrq_export.accounting import LayerShape, footprint
from gsrq_export.capture import KINDS
from gsrq_export.recipe import CacheRecipe, CodecSide, LayerBudget, Recipe

Place = tuple[int, str]  # a layer that owns a cache, from 0, and its keys ("key") or values ("value")
Budget = Mapping[Place, CodecSide]


def candidate_widths(recipe: Recipe, shape: LayerShape, layer: int, kind: str) -> list[int]:
    """Widths that are tried, widest first: the heads together, one head, and what the recipe has."""
    return sorted({shape.elements, shape.head_dim, recipe.codec.side(kind, layer).width}, reverse=True)


def with_budget(recipe: Recipe, budget: Budget, cache: CacheRecipe | None = None) -> Recipe:
    """The recipe with this budget: the commonest sides stand for all layers, the others get entries of their own.

    Raises:
        pydantic.ValidationError: a cache that does not fit the recipe.
    """
    layers = sorted({layer for layer, _ in budget})
    common = {kind: Counter(budget[layer, kind] for layer in layers).most_common(1)[0][0] for kind in KINDS}
    entries = []
    for layer in layers:
        own = {f"{kind}s": side for kind in KINDS if (side := budget[layer, kind]) != common[kind]}
        if own:
            entries.append(LayerBudget(layer=layer, **own))
    codec = recipe.codec.model_copy(update={"keys": common["key"], "values": common["value"], "layers": tuple(entries)})
    changed = recipe.model_copy(update={"codec": codec, "cache": cache or recipe.cache})
    return Recipe.model_validate(changed.model_dump(mode="json"))


def side_bytes(recipe: Recipe, shape: LayerShape, side: CodecSide, context: int, sequences: int) -> int:
    """Bytes of codes and codebook of one layer's keys (or values), as `accounting.footprint` counts them."""
    codec = recipe.codec.model_copy(update={"keys": side, "values": side, "layers": ()})
    both = footprint(recipe.model_copy(update={"codec": codec}), [shape], context, sequences)
    return (both.codes + both.codebooks) // 2


def exact_bytes(recipe: Recipe, layers: Sequence[LayerShape], context: int, sequences: int) -> int:
    """Bytes of the exact slots, which no budget changes."""
    return footprint(recipe, layers, context, sequences).exact


def cheapest(recipe: Recipe, shape: LayerShape, context: int, sequences: int, widths: Sequence[int]) -> CodecSide:
    """The side of one stage that takes the fewest bytes."""
    sides = [CodecSide(width=width, stages=1) for width in widths]
    return min(sides, key=lambda side: side_bytes(recipe, shape, side, context, sequences))


def uniform(layers: Sequence[LayerShape], heads: bool, stages: int) -> dict[Place, CodecSide]:
    """The same bits everywhere, sub-vectors as wide as the heads together (or as one head).

    Args:
        stages: of the widest sub-vectors; narrower ones get as many less, at least one.
    """
    widths = [shape.elements if heads else shape.head_dim for shape in layers]
    sides = [CodecSide(width=width, stages=max(1, stages * width // max(widths))) for width in widths]
    return {(i, kind): side for i, side in enumerate(sides) for kind in KINDS}


def best_uniform(
    recipe: Recipe, layers: Sequence[LayerShape], heads: bool, context: int, sequences: int, limit: int
) -> dict[Place, CodecSide] | None:
    """The uniform budget of the most stages within ``limit`` bytes; None where not even one stage fits."""
    found = None
    for stages in range(1, 257):
        budget = uniform(layers, heads, stages)
        if footprint(with_budget(recipe, budget), layers, context, sequences).total > limit:
            break
        found = budget
    return found

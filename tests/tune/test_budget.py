"""Bytes of budgets are those of the accounting, and recipes carry them whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsrq_export.accounting import LayerShape, footprint
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import CodecSide, Recipe, parse_recipe, resolved_yaml
from gsrq_export.tune.budget import best_uniform, candidate_widths, exact_bytes, side_bytes, uniform, with_budget
from gsrq_export.tune.target import make_target, parse_memory

LAYERS = [LayerShape(2, 64), LayerShape(2, 64), LayerShape(1, 32)]
RECIPE = parse_recipe(
    "{name: r, model: {path: m}, export: {max_length: 4096},"
    " cache: {sinks: 4, window: 16, block: 16, code_order: head}}",
    "r",
    Path(),
)
BUDGET = {
    (0, "key"): CodecSide(width=128, stages=20),
    (0, "value"): CodecSide(width=64, stages=3),
    (1, "key"): CodecSide(width=128, stages=20),
    (1, "value"): CodecSide(width=128, stages=1),
    (2, "key"): CodecSide(width=32, stages=2),
    (2, "value"): CodecSide(width=64 // 2, stages=7),
}


@pytest.mark.parametrize(("context", "sequences"), [(40, 1), (1000, 3), (4096, 64)])
def test_bytes_of_the_places_are_the_footprint(context: int, sequences: int) -> None:
    whole = footprint(with_budget(RECIPE, BUDGET), LAYERS, context, sequences)
    parts = sum(side_bytes(RECIPE, LAYERS[i], side, context, sequences) for (i, _), side in BUDGET.items())
    assert parts + exact_bytes(RECIPE, LAYERS, context, sequences) == whole.total


def test_recipes_carry_the_budget_with_as_few_entries_as_needed() -> None:
    recipe = with_budget(RECIPE, BUDGET)
    assert recipe.cache == RECIPE.cache
    again = parse_recipe(resolved_yaml(recipe), "r", Path("/"))
    assert (again.codec, again.cache) == (recipe.codec, recipe.cache)
    for (layer, kind), side in BUDGET.items():
        assert recipe.codec.side(kind, layer) == side
    same = uniform(LAYERS[:2], heads=True, stages=5)
    assert with_budget(RECIPE, same).codec.layers == ()
    assert with_budget(RECIPE, same).codec.keys == CodecSide(width=128, stages=5)


def test_the_uniform_budget_is_the_largest_that_fits() -> None:
    for heads in (True, False):
        limit = 3_000_000
        budget = best_uniform(RECIPE, LAYERS[:2], heads, 4096, 4, limit)
        assert budget is not None
        stages = budget[0, "key"].stages
        sizes = [
            footprint(with_budget(RECIPE, uniform(LAYERS[:2], heads, n)), LAYERS[:2], 4096, 4).total
            for n in (stages, stages + 1)
        ]
        assert sizes[0] <= limit < sizes[1]
    assert best_uniform(RECIPE, LAYERS[:2], True, 4096, 4, 1000) is None


def test_widths_are_all_heads_one_head_and_the_recipes() -> None:
    codec = RECIPE.codec.model_copy(update={"keys": CodecSide(width=32, stages=4)})
    recipe: Recipe = RECIPE.model_copy(update={"codec": codec})
    assert candidate_widths(recipe, LAYERS[0], 0, "key") == [128, 64, 32]
    assert candidate_widths(recipe, LAYERS[0], 0, "value") == [128, 64]


def test_targets_and_refusals() -> None:
    layers = LAYERS[:2]
    target = make_target(RECIPE, layers, 4096, 64, bits=1.0)
    assert target.bytes == 4096 * 64 * 2 * 256 // 8
    assert make_target(RECIPE, layers, 4096, 64, memory=parse_memory("20 MB")).bytes == 20_000_000
    least = {(i, kind): CodecSide(width=128, stages=1) for i in range(2) for kind in ("key", "value")}
    floor = footprint(with_budget(RECIPE, least), layers, 4096, 64)
    assert make_target(RECIPE, layers, 4096, 64, memory=floor.total).bytes == floor.total
    with pytest.raises(GsrqError, match=f"{floor.effective_bits:.3g} .* to 16 can be reached"):
        make_target(RECIPE, layers, 4096, 64, memory=floor.total - 1)
    with pytest.raises(GsrqError, match="can be reached"):
        make_target(RECIPE, layers, 4096, 64, memory=2 * 4096 * 64 * 512 + 1)
    with pytest.raises(GsrqError, match="over the recipe's export"):
        make_target(RECIPE, layers, 8192, 1, bits=4.0)
    with pytest.raises(GsrqError, match="--context 35: nothing is coded"):
        make_target(RECIPE, layers, 35, 1, bits=4.0)
    for text in ("1", "GB", "-1GB", "1 parsec"):
        with pytest.raises(GsrqError, match="is not a size"):
            parse_memory(text)
    assert parse_memory("1.5KiB") == 1536

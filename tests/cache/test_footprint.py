"""The one count of bytes and bits, by hand and through its callers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from attention_cases import random_codebook

from gsrq_export.accounting import LayerShape
from gsrq_export.accounting import effective_bits as of_recipe
from gsrq_export.baselines.base import LayerCodecs
from gsrq_export.baselines.base import effective_bits as of_codecs
from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.cache.footprint import count
from gsrq_export.cache.rule import CacheRule
from gsrq_export.recipe import CacheRecipe, CodecRecipe, CodecSide, ModelSource, Recipe

RULE = CacheRule(2, 5, 8)


def test_by_hand() -> None:
    found = count(RULE, elements=24, code_bits=28, shared_bytes=1000, context=60, sequences=3)
    assert RULE.coded(60) == 48
    assert found.codes == 3 * 48 * 28 // 8
    assert found.exact == 3 * (2 + 5 + 8) * 24 * 2
    assert found.codebooks == 1000
    assert found.elements == 3 * 60 * 24
    assert found.effective_bits == 8 * (504 + 2160 + 1000) / 4320
    assert found.compression == pytest.approx(16 / found.effective_bits)
    assert count(RULE, 24, 28, 1000, 60, slot_bytes=4).exact == 2 * 15 * 24 * 2


@pytest.mark.parametrize("wrong", [{"context": 0}, {"sequences": 0}, {"elements": 0}])
def test_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} 0"):
        count(**{"rule": RULE, "elements": 24, "code_bits": 28, "shared_bytes": 0, "context": 60, **wrong})


@pytest.mark.parametrize("context", [1, 60, 1000])
def test_a_recipe_and_the_codebooks_it_gives_count_alike(context: int) -> None:
    codec = CodecRecipe(keys=CodecSide(width=32, stages=3), values=CodecSide(width=16, stages=2))
    recipe = Recipe(name="x", model=ModelSource(path="m"), codec=codec, cache=CacheRecipe(sinks=2, window=5, block=8))
    spec = SimpleNamespace(layers=[SimpleNamespace(num_kv_heads=2, head_dim=16)])
    keys, values = random_codebook(32, 32, 3, 0, True), random_codebook(32, 16, 2, 1, True)
    codecs = [LayerCodecs(ResidualCodec(keys), ResidualCodec(values))]
    assert of_codecs(spec, codecs, RULE, context) == of_recipe(recipe, [LayerShape(2, 16)], context)  # type: ignore[arg-type]

"""What a recipe's cache takes, before anything is built, counted as `cache.footprint` counts.

`bits` in a recipe is nominal, 8 R / D. Codebooks count at stored precision: float16 codewords, float32 transforms
and centers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gsrq_export.cache.footprint import Footprint, count
from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.storage import SIDES
from gsrq_export.recipe import CodecSide, Recipe

CONTEXTS = (512, 1024, 2048, 8192, 32768, 131072)  # tokens
EXACT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class LayerShape:
    """Keys (and values) of a token in one layer: num_kv_heads * head_dim elements each."""

    num_kv_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        return self.num_kv_heads * self.head_dim


def contexts(max_length: int) -> list[int]:
    """Context lengths at which sizes are stated: round ones that the model can reach, and its longest."""
    return sorted({n for n in CONTEXTS if n < max_length} | {max_length})


def footprint(recipe: Recipe, layers: Sequence[LayerShape], context_length: int, batch: int = 1) -> Footprint:
    """Bytes at ``context_length`` tokens in each of ``batch`` rows.

    Args:
        layers: those that own a cache.
    Raises:
        ValueError: context_length or batch below 1, or no layers.
    """
    sides = [(recipe.codec.side(kind, i), layer) for kind in SIDES for i, layer in enumerate(layers)]
    return count(
        recipe.cache.rule,
        elements=sum(2 * layer.elements for layer in layers),
        code_bits=8 * sum(_code_bytes(side, layer) for side, layer in sides),
        shared_bytes=sum(_codebook_bytes(side, layer) for side, layer in sides) + _center_bytes(recipe, layers),
        context=context_length,
        sequences=batch,
        slot_bytes=EXACT_BYTES[recipe.cache.exact_dtype],
    )


def token_bytes(recipe: Recipe, layers: Sequence[LayerShape]) -> int:
    """Bytes of one coded token's codes, all layers."""
    return sum(_code_bytes(recipe.codec.side(kind, i), layer) for kind in SIDES for i, layer in enumerate(layers))


def nominal_bits(recipe: Recipe, layers: Sequence[LayerShape], kinds: Sequence[str] = SIDES) -> float:
    """Bits an element, codes alone, over all layers; of keys or values alone with one kind."""
    coded = [(layer.elements, recipe.codec.side(kind, i)) for kind in kinds for i, layer in enumerate(layers)]
    return sum(elements * side.nominal_bits for elements, side in coded) / sum(elements for elements, _ in coded)


def effective_bits(recipe: Recipe, layers: Sequence[LayerShape], context_length: int, batch: int = 1) -> float:
    """Bits an element of keys and values at a context length, everything counted (see the module)."""
    return footprint(recipe, layers, context_length, batch).effective_bits


def _code_bytes(side: CodecSide, layer: LayerShape) -> int:
    return layer.elements // side.width * side.stages


def _center_bytes(recipe: Recipe, layers: Sequence[LayerShape]) -> int:
    """Of the means that the rotated frame takes off keys, float32."""
    return 4 * sum(layer.elements for layer in layers) if recipe.codec.rotated_keys else 0


def _codebook_bytes(side: CodecSide, layer: LayerShape) -> int:
    groups = layer.elements // side.width
    return groups * side.width * (side.stages * CODEBOOK_SIZE * 2 + side.width * 4)

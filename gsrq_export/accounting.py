"""Honest numbers: what a coded cache takes in bytes, and what that is in bits an element.

`bits` in a recipe is nominal, 8 R / D. Here everything counts: codes, the exact tokens (sinks, window
and the block being filled, whose slots are there from the first token on) and the codebooks at stored
precision (float16 codewords, float32 transforms), over the elements of keys and values of all tokens.
The cache is linear, so there are no block tables. Codebooks are stored once, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's cache at a context length.

    Attributes:
        codes: of the tokens that are coded at that length; a runtime allocates them for its capacity.
        exact: all slots of the exact buffers, keys and values.
        codebooks: codewords and transforms as stored.
        elements: of keys and values of all tokens, layers and rows.
    """

    codes: int
    exact: int
    codebooks: int
    elements: int

    @property
    def total(self) -> int:
        return self.codes + self.exact + self.codebooks

    @property
    def per_sequence(self) -> int:
        """Without the codebooks, which all sequences share: what another user of a server costs."""
        return self.codes + self.exact

    @property
    def fp16(self) -> int:
        """Bytes of the same keys and values in 16 bits."""
        return 2 * self.elements

    @property
    def effective_bits(self) -> float:
        """Bits an element, everything counted; 16 for an uncoded 16-bit cache."""
        return 8 * self.total / self.elements

    @property
    def compression(self) -> float:
        """How many times smaller than a 16-bit cache; below 1 where coding does not pay."""
        return self.fp16 / self.total


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
    if context_length < 1 or batch < 1 or not layers:
        raise ValueError(f"need context_length, batch >= 1 and layers; got {context_length}, {batch}, {len(layers)}")
    rule = recipe.cache.rule
    sides = [(recipe.codec.side(kind, i), layer) for kind in SIDES for i, layer in enumerate(layers)]
    coded = rule.coded(context_length)
    slot = EXACT_BYTES[recipe.cache.exact_dtype]
    return Footprint(
        codes=batch * coded * sum(_code_bytes(side, layer) for side, layer in sides),
        exact=batch * rule.exact_slots * slot * sum(2 * layer.elements for layer in layers),
        codebooks=sum(_codebook_bytes(side, layer) for side, layer in sides),
        elements=batch * context_length * sum(2 * layer.elements for layer in layers),
    )


def nominal_bits(recipe: Recipe, layers: Sequence[LayerShape], kinds: Sequence[str] = SIDES) -> float:
    """Bits an element, codes alone, over all layers; of keys or values alone with one kind."""
    coded = [(layer.elements, recipe.codec.side(kind, i)) for kind in kinds for i, layer in enumerate(layers)]
    return sum(elements * side.nominal_bits for elements, side in coded) / sum(elements for elements, _ in coded)


def effective_bits(recipe: Recipe, layers: Sequence[LayerShape], context_length: int, batch: int = 1) -> float:
    """Bits an element of keys and values at a context length, everything counted (see the module)."""
    return footprint(recipe, layers, context_length, batch).effective_bits


def _code_bytes(side: CodecSide, layer: LayerShape) -> int:
    return layer.elements // side.width * side.stages


def _codebook_bytes(side: CodecSide, layer: LayerShape) -> int:
    groups = layer.elements // side.width
    return groups * side.width * (side.stages * CODEBOOK_SIZE * 2 + side.width * 4)

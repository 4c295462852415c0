"""Honest numbers: what a coded cache takes in bytes, and what that is in bits an element. One count for all methods.

Everything counts: codes, the exact tokens (sinks, window and the block being filled, whose slots are there from the
first token on) and what all tokens share (codebooks as stored), over the elements of keys and values of all tokens.
The cache is linear, so there are no block tables. What is shared is stored once, whatever the number of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from gsrq_export.cache.rule import CacheRule


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's cache at a context length.

    Attributes:
        codes: of the tokens that are coded at that length; a runtime allocates them for its capacity.
        exact: all slots of the exact buffers, keys and values.
        codebooks: codewords and transforms as stored, and whatever else all tokens share.
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


def count(
    rule: CacheRule,
    elements: int,
    code_bits: float,
    shared_bytes: int,
    context: int,
    sequences: int = 1,
    slot_bytes: int = 2,
) -> Footprint:
    """The footprint of ``sequences`` of ``context`` tokens each.

    Args:
        elements: of keys and values of one token, over all layers.
        code_bits: what one coded token stores, over all layers: codes, scales, zero points and norms.
        shared_bytes: what all tokens of all sequences share.
        slot_bytes: bytes of an element of an exact token.
    Raises:
        ValueError: context, sequences or elements below 1.
    """
    if min(context, sequences, elements) < 1:
        raise ValueError(f"context {context}, sequences {sequences} and elements {elements} must be at least 1")
    return Footprint(
        codes=round(sequences * rule.coded(context) * code_bits / 8),
        exact=sequences * rule.exact_slots * slot_bytes * elements,
        codebooks=shared_bytes,
        elements=sequences * context * elements,
    )

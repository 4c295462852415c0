"""Codewords that are int8 times a power of two, one a stage: half the bytes where a kernel keeps them as int8.

They stay exact in float16, so nothing else changes. A kernel that adds stages in integers multiplies those of
exponent e by 2^(e - least), which ``KEY_SPREAD`` keeps within a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.errors import GsrqError

LARGEST = 127
LEAST_EXPONENT, MOST_EXPONENT = -24, 9  # 2^-24 is float16's least step; 127 * 2^10 overflows it
KEY_SPREAD = 6  # exponents of a key codebook's stages are at most so far apart


def snap(book: Codebook, spread: int | None = None) -> Codebook:
    """The nearest codebook that is int8 times a power of two a stage; one that is already stays as it is.

    A stage's exponent, shared by all groups, is the least with which its largest element is at most 127 units.

    Args:
        spread: exponents below the largest by more than this are raised; None: any may stand beside any other.
    """
    integers, exponents = _nearest(book, spread)
    words = integers * torch.exp2(exponents)[None, :, None, None]
    return replace(book, codewords=words.to(torch.float16))


def snap_side(book: Codebook, kind: str) -> Codebook:
    """The codebook of a layer's keys (kind "key") or values ("value") snapped; keys within ``KEY_SPREAD``."""
    return snap(book, KEY_SPREAD if kind == "key" else None)


def snap_layers(layers: Sequence[LayerCodebooks]) -> list[LayerCodebooks]:
    """All codebooks of a model snapped."""
    return [LayerCodebooks(snap_side(pair.keys, "key"), snap_side(pair.values, "value")) for pair in layers]


def stage_integers(book: Codebook, spread: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A codebook that ``snap`` made, in integers: codewords == integers * 2^exponents[stage].

    Returns:
        int8 [groups, stages, 256, width] and int32 [stages].
    Raises:
        GsrqError: a stage that is no int8 times a power of two within the spread.
    """
    integers, exponents = _nearest(book, spread)
    differ = integers * torch.exp2(exponents)[None, :, None, None] != book.codewords.double()
    wrong = torch.nonzero(differ.any(3).any(2).any(0)).flatten().tolist()
    if wrong:
        raise GsrqError(
            f"codewords of stages {', '.join(map(str, wrong))} are no int8 times a power of two",
            "build with codec.codewords: int8",
        )
    return integers.to(torch.int8), exponents.to(torch.int32)


def _nearest(book: Codebook, spread: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [G, R, 256, D] and exponents [R], both float64."""
    largest = book.codewords.abs().amax((0, 2, 3)).double()
    exponents = torch.ceil(torch.log2(largest / LARGEST)).clamp(LEAST_EXPONENT, MOST_EXPONENT)
    if spread is not None:
        exponents = exponents.clamp(min=float(exponents.max()) - spread)
    integers = book.codewords.double() / torch.exp2(exponents)[None, :, None, None]
    return integers.round().clamp(-LARGEST, LARGEST), exponents

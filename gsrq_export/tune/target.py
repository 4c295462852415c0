"""What the cache may take, and whether a recipe's model can reach it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gsrq_export.accounting import LayerShape, footprint
from gsrq_export.capture import KINDS
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import Recipe
from gsrq_export.tune.budget import candidate_widths, cheapest, with_budget

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS["TIB"] = 2**40
MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


@dataclass(frozen=True)
class Target:
    """``bytes`` for the caches of ``sequences`` sequences of ``context`` tokens each, codebooks counted once."""

    context: int
    sequences: int
    bytes: int


def parse_memory(text: str) -> int:
    """Bytes of "1GB" (10^9), "512 MiB" (2^20 each) and the like.

    Raises:
        GsrqError: not a number with a unit.
    """
    found = MEMORY.fullmatch(text)
    if not found or found[2].upper() not in UNITS:
        raise GsrqError(f"--memory {text!r} is not a size", "write a number and a unit, such as 1GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def make_target(
    recipe: Recipe,
    layers: Sequence[LayerShape],
    context: int,
    sequences: int,
    bits: float | None = None,
    memory: int | None = None,
) -> Target:
    """The target, checked against what the recipe's cache rule and model allow.

    Args:
        bits: effective bits an element; else ``memory``, in bytes, is the target.
    Raises:
        GsrqError: a context that the recipe does not reach or in which nothing is coded, or a target that no budget
            meets; names the reachable range.
    """
    rule = recipe.cache.rule
    if context > recipe.export.max_length:
        raise GsrqError(
            f"--context {context}: over the recipe's export.max_length {recipe.export.max_length}",
            f"use at most {recipe.export.max_length}, or raise export.max_length",
        )
    for name, length in (("--context", context), ("traffic.sequence_length", recipe.traffic.sequence_length)):
        if rule.coded(length) < 1:
            raise GsrqError(
                f"{name} {length}: nothing is coded: sinks + window + block is {rule.exact_slots}",
                f"use {rule.exact_slots} or more, or lower the recipe's cache.window",
            )
    if recipe.traffic.sequences < 3:
        raise GsrqError(
            f"traffic.sequences {recipe.traffic.sequences}: too few to train on some and measure on others",
            "use 3 or more; 32 are a fair minimum",
        )
    size = footprint(recipe, layers, context, sequences)
    wanted = memory if memory is not None else int((bits or 0.0) * size.elements / 8)
    target = Target(context, sequences, wanted)
    small = {
        (i, kind): cheapest(recipe, shape, target.context, target.sequences, candidate_widths(recipe, shape, i, kind))
        for i, shape in enumerate(layers)
        for kind in KINDS
    }
    least = footprint(with_budget(recipe, small), layers, context, sequences).total
    if not least <= wanted <= size.fp16:
        given = f"--memory of {memory:,} bytes" if memory is not None else f"--bits {bits:g}"
        low, high = 8 * least / size.elements, 16
        raise GsrqError(
            f"{given} is {8 * wanted / size.elements:.3g} effective bits at {sequences} sequences of {context} tokens: "
            f"{low:.3g} (one byte a sub-vector, {rule.exact_slots} exact slots a layer) to {high} can be reached",
            f"ask for {low:.3g} to {high} bits or {least:,} to {size.fp16:,} bytes"
            + ("; a smaller cache.window or cache.block, or more sequences, reach lower" if wanted < least else ""),
        )
    return target

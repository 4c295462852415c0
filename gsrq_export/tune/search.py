"""The search: the least loss within a target's bytes, over every place's width and stages, then sinks and window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gsrq_export.accounting import LayerShape, footprint
from gsrq_export.cache.footprint import Footprint
from gsrq_export.codec.codebook import Codebook
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import CacheRecipe, CodecSide, Recipe
from gsrq_export.stages.progress import Reporter
from gsrq_export.tune.allocate import Option, allocate
from gsrq_export.tune.budget import Budget, Place, best_uniform, exact_bytes, side_bytes, uniform, with_budget
from gsrq_export.tune.ladder import interpolated
from gsrq_export.tune.measure import Divergence, Meter
from gsrq_export.tune.settings import CURVE, HEADROOM, SINKS, WINDOWS
from gsrq_export.tune.stages import Ladders
from gsrq_export.tune.target import Target

TUNED = "tuned"
UNIFORM = {True: "uniform, heads together", False: "uniform, head by head"}


@dataclass(frozen=True)
class Candidate:
    """A whole budget and what was measured of it.

    Attributes:
        name: TUNED or one of UNIFORM.
        recipe: the given one with this budget and cache.
        size: at the target's context and sequences.
        measured: of all places coded together, on the sequences kept for comparing.
        summed: of its places each coded alone, added up, on the sequences of the ladders.
    """

    name: str
    recipe: Recipe
    size: Footprint
    measured: Divergence
    summed: Divergence


@dataclass(frozen=True)
class Result:
    """Everything that was compared. ``curve``: pairs of a uniform and a tuned budget of at most equal bytes."""

    best: Candidate
    uniform: list[Candidate]
    tuned: list[Candidate]
    curve: list[tuple[Candidate, Candidate]]


def ladder_bits(recipe: Recipe, layers: Sequence[LayerShape], target: Target) -> float:
    """Nominal bits of the longest ladders: HEADROOM times the best uniform budget's, enough for all that is tried."""
    given = recipe.cache
    least = {"window": round(given.window * min(WINDOWS)), "sinks": round(given.sinks * min(SINKS))}
    found = [8 / max(shape.elements for shape in layers)]
    for cache, factor in ((given, HEADROOM), (given.model_copy(update=least), max(CURVE))):
        of = recipe.model_copy(update={"cache": cache})
        for heads in (True, False):
            budget = best_uniform(of, layers, heads, target.context, target.sequences, target.bytes)
            found += [factor * side.nominal_bits for side in (budget or {}).values()]
    return max(found)


@dataclass(frozen=True)
class Search:
    """Attributes:
    recipe: the one given.
    books: a ladder's longest codebook, by (layer, kind, width).
    ladders: what was measured of each.
    meter: over the sequences kept for comparing.
    """

    recipe: Recipe
    layers: Sequence[LayerShape]
    target: Target
    books: dict[tuple[int, str, int], Codebook]
    ladders: Ladders
    meter: Meter

    def run(self, reporter: Reporter) -> Result:
        """Allocate, measure, compare.

        Raises:
            GsrqError: nothing fits the target.
        """
        with reporter.task("search: whole budgets measured") as task:

            def measured(name: str, budget: Budget | None, cache: CacheRecipe) -> list[Candidate]:
                if budget is None:
                    return []
                task.advance(1)
                return [self.candidate(name, budget, cache)]

            given, limit = self.recipe.cache, self.target.bytes
            evens = [c for name, budget in self._uniforms(limit, given) for c in measured(name, budget, given)]
            tuned = measured(TUNED, self.allocated(limit, given), given)
            if not tuned:
                raise GsrqError(f"no budget fits {limit:,} bytes", "ask for more bits or bytes")
            for field, factors in (("window", WINDOWS), ("sinks", SINKS)):
                now = _least(tuned).recipe.cache
                for value in sorted(
                    {round(getattr(now, field) * factor) for factor in factors} - {getattr(now, field)}
                ):
                    cache = now.model_copy(update={field: value})
                    if self._fits(cache):
                        tuned += measured(TUNED, self.allocated(limit, cache), cache)
            cache = _least(tuned).recipe.cache
            if cache != given:  # so that what is left between them is the budgets' doing
                evens += [c for name, budget in self._uniforms(limit, cache) for c in measured(name, budget, cache)]
            best = _least([_least(tuned), *evens])
            curve = []
            heads, stages = self._even_stages(_least(evens))
            for count in sorted({min(256, max(1, int(stages * factor))) for factor in CURVE}):
                even = uniform(self.layers, heads, stages=count)
                (point,) = measured(UNIFORM[heads], even, cache)
                curve += [(point, c) for c in measured(TUNED, self.allocated(point.size.total, cache), cache)]
            return Result(best, evens, tuned, curve)

    def options(self, place: Place, cache: CacheRecipe) -> list[Option]:
        """Every width and number of stages of a place, with its bytes and its loss when coded alone."""
        recipe = self.recipe.model_copy(update={"cache": cache})
        found = []
        for (layer, kind, width), measures in self.ladders.items():
            if (layer, kind) != place:
                continue
            losses = interpolated({stages: measure.loss for stages, measure in measures.items()})
            for stages, loss in enumerate(losses, 1):
                side = CodecSide(width=width, stages=stages)
                size = side_bytes(recipe, self.layers[layer], side, self.target.context, self.target.sequences)
                found.append(Option(width, stages, size, loss))
        return found

    def allocated(self, limit: int, cache: CacheRecipe) -> dict[Place, CodecSide] | None:
        """The budget of the least summed loss within ``limit`` bytes, exact slots and all."""
        recipe = self.recipe.model_copy(update={"cache": cache})
        left = limit - exact_bytes(recipe, self.layers, self.target.context, self.target.sequences)
        places = list(dict.fromkeys((layer, kind) for layer, kind, _ in self.ladders))
        chosen = allocate([self.options(place, cache) for place in places], left)
        if chosen is None:
            return None
        return {
            place: CodecSide(width=option.width, stages=option.stages)
            for place, option in zip(places, chosen, strict=True)
        }

    def candidate(self, name: str, budget: Budget, cache: CacheRecipe) -> Candidate:
        """Measured, all places coded together."""
        recipe = with_budget(self.recipe, budget, cache)
        books = {place: self.books[(*place, side.width)].first_stages(side.stages) for place, side in budget.items()}
        size = footprint(recipe, self.layers, self.target.context, self.target.sequences)
        return Candidate(name, recipe, size, self.meter.measure(books, cache.rule), self._summed(budget))

    def _summed(self, budget: Budget) -> Divergence:
        """The places' divergences when coded alone, added up."""

        def total(field: str) -> float | None:
            values = []
            for place, side in budget.items():
                measures = {r: getattr(measure, field) for r, measure in self.ladders[(*place, side.width)].items()}
                if None in measures.values():
                    return None
                values.append(interpolated(measures)[side.stages - 1])
            return sum(values)

        return Divergence(total("kl") or 0.0, total("answer_kl"))

    def _uniforms(self, limit: int, cache: CacheRecipe) -> list[tuple[str, Budget | None]]:
        recipe = self.recipe.model_copy(update={"cache": cache})
        context, sequences = self.target.context, self.target.sequences
        return [
            (UNIFORM[heads], best_uniform(recipe, self.layers, heads, context, sequences, limit))
            for heads in (True, False)
        ]

    def _even_stages(self, even: Candidate) -> tuple[bool, int]:
        """Whether a uniform budget's sub-vectors are all heads wide, and its stages (in the widest layer)."""
        return even.name == UNIFORM[True], max(even.recipe.codec.side("key", i).stages for i in range(len(self.layers)))

    def _fits(self, cache: CacheRecipe) -> bool:
        """Whether the rule codes at the target's context, and enough of the traffic for the loss to tell."""
        length, rule = self.recipe.traffic.sequence_length, cache.rule
        fair = cache.window <= self.recipe.cache.window or 2 * rule.coded(length) >= length
        return fair and rule.coded(self.target.context) > 0 and rule.coded(length - 1) > 0


def _least(candidates: Sequence[Candidate]) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.measured.loss)

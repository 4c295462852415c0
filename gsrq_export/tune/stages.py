"""The stages of a search that take long: ladders of codebooks, and what the model feels of each.

Traffic and capture are the build's own stages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsrq_export.accounting import LayerShape
from gsrq_export.build.source import Source
from gsrq_export.build.stages import stages as build_stages
from gsrq_export.capture import KINDS, Captured, attention_metric, output_projections, training_vectors
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.codec.storage import load_book, save_book
from gsrq_export.recipe import CaptureRecipe, CodecSide, Recipe
from gsrq_export.stages.engine import Context, Stage
from gsrq_export.tune.budget import candidate_widths, with_budget
from gsrq_export.tune.ladder import rungs
from gsrq_export.tune.measure import Divergence, Meter, answer_tokens
from gsrq_export.tune.settings import Effort

Ladders = dict[tuple[int, str, int], dict[int, Divergence]]  # of (layer, kind, width): by stages


@dataclass(frozen=True)
class Split:
    """Sequences by index: trained on, for the ladders' measures, for those of whole budgets."""

    train: list[int]
    sensed: list[int]
    compared: list[int]


@dataclass(frozen=True)
class Plan:
    """What the long stages work from.

    Attributes:
        recipe: the one given.
        source: its model, with the recipe that has the narrowest sub-vectors of each place, which are captured.
        effort: see there.
        bits: nominal bits of the longest ladders.
    """

    recipe: Recipe
    source: Source
    effort: Effort
    bits: float

    @classmethod
    def make(cls, recipe: Recipe, effort: Effort, bits: float, device: str = "cpu") -> Plan:
        narrow = {
            (i, kind): CodecSide(width=candidate_widths(recipe, shape, i, kind)[-1], stages=1)
            for i, shape in enumerate(Source(recipe).shapes())
            for kind in KINDS
        }
        every = recipe.model_copy(update={"capture": CaptureRecipe()})  # whole sequences are trained on or held back
        return cls(recipe, Source(with_budget(every, narrow), device), effort, bits)

    @property
    def shapes(self) -> Sequence[LayerShape]:
        return self.source.shapes()

    def highest(self, width: int) -> int:
        """Stages of the longest ladder of this width."""
        return max(1, min(256, round(self.bits * width / 8)))

    def ladders(self) -> list[tuple[int, str, int]]:
        """(layer, kind, width) of all ladders."""
        return [
            (i, kind, width)
            for i, shape in enumerate(self.shapes)
            for kind in KINDS
            for width in candidate_widths(self.recipe, shape, i, kind)
        ]


def split(answers: torch.Tensor, effort: Effort) -> Split:
    """Hold back sequences for measuring, those with recall passages and those without in turn; at most half of all.

    Args:
        answers: bool [N, T] of ``answer_tokens``.
    """
    count = len(answers)
    compared = max(1, min(effort.compared, count // 3))
    sensed = max(1, min(effort.sensed, count // 6))
    has = answers.any(1).tolist()
    groups = [[i for i in range(count) if has[i] == wanted][::-1] for wanted in (True, False)]
    held: list[int] = []
    while len(held) < compared + sensed:
        held += [group.pop(0) for group in groups if group]
    held = held[: compared + sensed]
    return Split([i for i in range(count) if i not in held], held[compared:], held[:compared])


def tune_stages(plan: Plan) -> list[Stage]:
    """Traffic, capture, ladders and sensitivity, in order."""
    recipe = plan.recipe
    traffic, capture = build_stages(plan.source)[:2]
    codec = recipe.codec.model_dump(mode="json", include={"method", "weights", "tau", "metric", "seed", "key_frame"})
    material = {
        "codec": codec,
        "effort": asdict(plan.effort),
        "ladders": [[*ladder, plan.highest(ladder[2])] for ladder in plan.ladders()],
        "model": plan.source.weight_hash,
        "tokenizer": plan.source.tokenizer_hashes,
        **plan.source.calculated_on,
    }
    rule = recipe.cache.model_dump(mode="json", include={"sinks", "window", "block"})
    coding = recipe.codec.model_dump(mode="json", include={"beam", "codewords"})
    return [
        traffic,
        capture,
        Stage("ladders", material, partial(_train, plan), ("traffic", "capture")),
        Stage(
            "sensitivity",
            {"rule": rule, **coding, **plan.source.calculated_on},
            partial(_sense, plan),
            ("traffic", "ladders"),
        ),
    ]


def read_traffic(directory: Path, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [N, T] and where answers are predicted, bool [N, T]."""
    ids = np.load(directory / "ids.npy", allow_pickle=False)
    return torch.from_numpy(ids), answer_tokens(ids, tokenizer)


def book_name(layer: int, kind: str, width: int) -> str:
    return f"layer-{layer:03d}.{kind}.{width}.safetensors"


def read_book(directory: Path, layer: int, kind: str, width: int) -> Codebook:
    """A ladder's longest codebook."""
    return load_book(directory / book_name(layer, kind, width))[0]


def measures_in(directory: Path) -> Ladders:
    """What the sensitivity stage measured."""
    found: Ladders = {}
    for file in sorted(directory.glob("layer-*.json")):
        layer, kind, width = file.stem.removeprefix("layer-").split(".")
        data = json.loads(file.read_text())
        found[int(layer), kind, int(width)] = {int(stages): Divergence(**m) for stages, m in data.items()}
    return found


def _train(plan: Plan, context: Context) -> None:
    source, codec = plan.source, plan.recipe.codec
    spec, captured = source.spec, Captured(context.inputs["capture"])
    ids, answers = read_traffic(context.inputs["traffic"], source.tokenizer)
    train = torch.tensor(split(answers, plan.effort).train)
    rows = (train[:, None] * ids.shape[1] + torch.arange(ids.shape[1])).flatten()
    rows = rows[:: max(1, -(-len(rows) // plan.effort.rows))]
    outputs = output_projections(source.model, spec) if codec.metric == "attention" else []
    training = Training(codec.method, plan.effort.iterations, codec.seed)
    ladders = plan.ladders()
    steps = {ladder: plan.shapes[ladder[0]].elements // ladder[2] * plan.highest(ladder[2]) for ladder in ladders}
    with context.reporter.task("ladders: stages", sum(steps.values())) as task:
        for ladder in ladders:
            name = book_name(*ladder)
            if context.has(name):
                task.advance(steps[ladder])
                continue
            index, kind, width = ladder
            layer = spec.layers[index]
            weights = transform = None
            if codec.weights == "gradient":
                weights = gradient_weights(captured.gradients(layer, kind, width)[rows], codec.tau)
            if codec.metric == "attention":
                transform = attention_metric(captured, spec, layer, kind, width, outputs)
            vectors, center = training_vectors(captured, spec, layer, kind, codec.rotated_keys)
            vectors = vectors[rows].to(source.place)
            book, _ = train_codebook(vectors, weights, width, plan.highest(width), training, transform, task.advance)
            context.unit(name, partial(save_book, replace(book.to("cpu"), center=center)))


def _sense(plan: Plan, context: Context) -> None:
    source = plan.source
    ids, answers = read_traffic(context.inputs["traffic"], source.tokenizer)
    sensed = split(answers, plan.effort).sensed
    codec = plan.recipe.codec
    spec = source.spec  # before the model is moved
    meter = Meter(source.placed_model, spec, ids[sensed], answers[sensed], codec.beam, codec.codewords == "int8")
    steps = {ladder: rungs(plan.highest(ladder[2]), plan.effort.rungs) for ladder in plan.ladders()}
    with context.reporter.task("sensitivity: measures", sum(map(len, steps.values()))) as task:
        for ladder, stages in steps.items():
            name = _measures_name(*ladder)
            if context.has(name):
                task.advance(len(stages))
                continue
            index, kind, _ = ladder
            book, found = read_book(context.inputs["ladders"], *ladder), {}
            for count in stages:
                measure = meter.measure({(index, kind): book.first_stages(count)}, plan.recipe.cache.rule)
                found[count] = asdict(measure)
                task.advance(1)
            context.unit(name, partial(_save_json, found))


def _measures_name(layer: int, kind: str, width: int) -> str:
    return f"layer-{layer:03d}.{kind}.{width}.json"


def _save_json(data: object, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

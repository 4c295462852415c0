"""What a search leaves behind: the recipe, tuned.json and tuned.html."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from gsrq_export import __version__
from gsrq_export.build.device import describe_device
from gsrq_export.capture import KINDS
from gsrq_export.recipe import Recipe, parse_recipe
from gsrq_export.report.charts import Figure, serving
from gsrq_export.report.html import render
from gsrq_export.report.svg import Axis, Curve, plot
from gsrq_export.tune.ladder import interpolated
from gsrq_export.tune.search import Candidate, Result
from gsrq_export.tune.settings import Effort
from gsrq_export.tune.stages import Ladders, Split
from gsrq_export.tune.target import Target

LEAST_LOSS = 1e-9  # what a logarithmic axis can show


@dataclass(frozen=True)
class Report:
    """A finished search and what it was asked."""

    recipe: Recipe
    target: Target
    effort_name: str
    effort: Effort
    split: Split
    ladders: Ladders
    result: Result
    device: str = "cpu"


def recipe_text(report: Report) -> str:
    """The best budget's recipe in YAML, with what was measured in comments."""
    best, target = report.result.best, report.target
    size = best.size
    data = best.recipe.model_dump(mode="json")
    entries = data["codec"].pop("layers")
    head = [
        f"Tuned by gsrq {__version__} for {target.bytes:,} bytes: "
        f"{target.sequences} sequences of {target.context} tokens.",
        f"Takes {size.total:,} bytes, {size.effective_bits:.4f} effective bits an element: codes {size.codes:,}, "
        f"exact slots {size.exact:,}, codebooks {size.codebooks:,}.",
        f"Kept: {best.name}. KL(model || coded model) on held-out traffic, nats a token: {_measures(best)}.",
        *(
            f"  beside it {other.name} at {_rule(other)}: {_measures(other)}"
            for other in report.result.uniform
            if other is not best
        ),
        "Measured on quickly trained codebooks; those of a build are trained on all traffic.",
    ]
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if entries:
        listed = ["  layers:  # where it is not as below; losses of each place coded alone, nats a token"]
        for entry in entries:
            sides = {kind: entry[f"{kind}s"] for kind in KINDS if entry[f"{kind}s"]}
            shown = ", ".join(
                f"{kind}s: {{width: {side['width']}, stages: {side['stages']}}}" for kind, side in sides.items()
            )
            losses = ", ".join(
                f"{kind}s {_loss(report.ladders, entry['layer'], kind, side):.3g}" for kind, side in sides.items()
            )
            listed.append(f"  - {{layer: {entry['layer']}, {shown}}}  # {losses}")
        body = body.replace("\ncodec:\n", "\ncodec:\n" + "\n".join(listed) + "\n", 1)
    text = "".join(f"# {line}\n" for line in head) + body
    if parse_recipe(text, "tuned", Path("/")) != best.recipe:
        raise AssertionError("the recipe written is not the one that was measured")
    return text


def report_data(report: Report, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Everything as plain data."""
    result = report.result
    return {
        "recipe": report.recipe.model_dump(mode="json"),
        "target": asdict(report.target),
        "effort": {"name": report.effort_name, **asdict(report.effort)},
        "split": asdict(report.split),
        "ladders": [
            {"layer": layer, "kind": kind, "width": width, "measures": {str(r): asdict(m) for r, m in rungs.items()}}
            for (layer, kind, width), rungs in report.ladders.items()
        ],
        "best": _candidate(result.best),
        "uniform": [_candidate(c) for c in result.uniform],
        "tuned": [_candidate(c) for c in result.tuned],
        "curve": [{"uniform": _candidate(one), "tuned": _candidate(other)} for one, other in result.curve],
        "environment": {
            "gsrq_export": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            **describe_device(report.device),
        },
        "seconds": dict(seconds),
    }


def page(report: Report) -> str:
    """tuned.html: the rate-quality curve and all that was compared. Nothing is fetched."""
    result = report.result
    target = report.target
    what = f"effective bits an element, {serving(f'{target.context}x{target.sequences}')} tokens"
    uniform, tuned = ([pair[i] for pair in result.curve] for i in (0, 1))
    curves = [
        Curve(label, style, [(c.size.effective_bits, max(LEAST_LOSS, c.measured.loss)) for c in side])
        for label, style, side in (("uniform", "exact", uniform), ("tuned", "coded", tuned))
    ]
    chart = plot("Loss against effective bits", Axis(what, log=True), Axis("loss, nats a token", log=True), curves)
    figure = Figure(
        "Loss against effective bits", "Lower is better; each tuned point has at most its pair's bytes.", chart
    )
    compared = [result.best, *(c for c in (*result.uniform, *result.tuned) if c != result.best)]
    rows = [["budget", "sinks", "window", "bytes", "effective bits", "KL", "KL of answers", "KL added up"]]
    rows += [_row(c) for c in compared]
    budget = [["layer", "keys D", "keys R", "values D", "values R"]]
    layers = sorted({layer for layer, _, _ in report.ladders})
    for layer in layers:
        sides = [result.best.recipe.codec.side(kind, layer) for kind in KINDS]
        budget.append([str(layer), *(str(n) for side in sides for n in (side.width, side.stages))])
    goal = f"{target.bytes:,} bytes for {target.sequences} sequences of {target.context} tokens"
    return render("tuned.html.j2", name=report.recipe.name, target=goal, figure=figure, compared=rows, budget=budget)


def _loss(ladders: Ladders, layer: int, kind: str, side: Mapping[str, int]) -> float:
    measures = ladders[layer, kind, side["width"]]
    return interpolated({r: m.loss for r, m in measures.items()})[side["stages"] - 1]


def _measures(candidate: Candidate) -> str:
    found = candidate.measured
    answers = "" if found.answer_kl is None else f" ({found.answer_kl:.4g} of answers)"
    return f"{found.kl:.4g}{answers} at {candidate.size.effective_bits:.4f} bits"


def _rule(candidate: Candidate) -> str:
    return f"{candidate.recipe.cache.sinks} sinks and window {candidate.recipe.cache.window}"


def _candidate(candidate: Candidate) -> dict[str, Any]:
    layers = sorted({budget.layer for budget in candidate.recipe.codec.layers})
    codec = candidate.recipe.codec
    return {
        "name": candidate.name,
        "sinks": candidate.recipe.cache.sinks,
        "window": candidate.recipe.cache.window,
        "keys": codec.keys.model_dump(),
        "values": codec.values.model_dump(),
        "layers": [
            {"layer": i, "keys": codec.side("key", i).model_dump(), "values": codec.side("value", i).model_dump()}
            for i in layers
        ],
        "bytes": {**asdict(candidate.size), "total": candidate.size.total},
        "effective_bits": candidate.size.effective_bits,
        "measured": {**asdict(candidate.measured), "loss": candidate.measured.loss},
        "added_up": {**asdict(candidate.summed), "loss": candidate.summed.loss},
    }


def _row(candidate: Candidate) -> list[str]:
    cache, found = candidate.recipe.cache, candidate.measured
    answers = "none" if found.answer_kl is None else f"{found.answer_kl:.4g}"
    return [
        candidate.name,
        str(cache.sinks),
        str(cache.window),
        f"{candidate.size.total:,}",
        f"{candidate.size.effective_bits:.3f}",
        f"{found.kl:.4g}",
        answers,
        f"{candidate.summed.kl:.4g}",
    ]

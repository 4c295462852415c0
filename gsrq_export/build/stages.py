"""The stages of a build. Each reads finished directories and writes its own (see stages/engine.py)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsrq_export import native
from gsrq_export.build.codebooks import codebooks_stage
from gsrq_export.build.profile import profile_stage
from gsrq_export.build.rivals import compare_stage
from gsrq_export.build.source import Source
from gsrq_export.capture import (
    KINDS,
    CaptureSettings,
    capture,
    shard_batch,
    shard_file,
)
from gsrq_export.codec.finetune import Finetuning, finetune
from gsrq_export.codec.int8 import snap_layers
from gsrq_export.codec.storage import load_codebooks, save_codebooks
from gsrq_export.compare.subject import EvaluationText
from gsrq_export.evaluate.fidelity import FidelitySettings
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.suite import EvaluationSettings, evaluate_pair, given_tokens
from gsrq_export.evaluate.tasks.measure import TaskSettings
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.export.model import CODEBOOKS_FILE, export_onnx
from gsrq_export.export.trace import ExportSettings
from gsrq_export.recipe import EvaluateRecipe, Recipe, SelfSource, TrafficRecipe
from gsrq_export.recipe import Source as TextSource
from gsrq_export.runtime.session import OrtModel
from gsrq_export.stages.engine import Context, Stage
from gsrq_export.stages.keys import file_hash
from gsrq_export.stages.storage import await_files, json_writer
from gsrq_export.traffic.build import build_traffic, source_material, traffic_material

SAMPLED_TEXT = SelfSource(kind="self", seed=1_000_003)  # held out where the recipe names no text
TEXT_FILE = "held-out.txt"  # of the evaluation, for the comparison
SNAPPING = "int8"  # the stage that makes codewords so
HELD_OUT_LENGTH = 512  # tokens of a drawn stretch; many short ones sample faster than few long ones


def stages(source: Source) -> list[Stage]:
    """All stages of the recipe, in order."""
    recipe = source.recipe
    model = {"weights": source.weight_hash, "tokenizer": source.tokenizer_hashes}
    codec = recipe.codec.model_dump(mode="json")
    finetuning = codec.pop("finetune")
    beam, codewords = codec["beam"], codec.pop("codewords")
    if not codec["refits"]:
        del codec["beam"]  # without refits training is greedy
    widths = {**captured_widths(source), "weights": recipe.codec.weights, "key_frame": recipe.codec.key_frame}
    last, here = last_training(recipe), source.calculated_on
    found = [
        Stage(
            "traffic",
            {
                "traffic": traffic_material(recipe.traffic),
                "model": model,
            },
            partial(_traffic, source),
        ),
        Stage(
            "capture",
            {"model": model, "widths": widths, "kept": kept_material(recipe), **here},
            partial(_capture, source),
            ("traffic",),
            True,
        ),
        Stage(
            "codebooks",
            {"codec": codec, "model": model, **here, **source.reduced},
            partial(codebooks_stage, source),
            ("capture",),
            True,
        ),
    ]
    if finetuning:
        rule = recipe.cache.model_dump(mode="json", exclude={"code_order"})  # which changes no codebook
        material = {"finetune": finetuning, "beam": beam, "cache": rule, **here}
        found.append(Stage("finetune", material, partial(_finetune, source), ("traffic", "codebooks")))
    if codewords == "int8":
        found.append(Stage(SNAPPING, {"codewords": codewords}, partial(_snap, source), (last_float(recipe),)))
    found += [
        Stage(
            "profile",
            {"beam": beam, "model": model, "sequence_length": recipe.traffic.sequence_length},
            partial(_profile, source),
            ("capture", last),
        ),
        Stage(
            "onnx",
            {
                "cache": recipe.cache.model_dump(mode="json"),
                "beam": beam,
                "export": recipe.export.model_dump(mode="json"),
                "model": model,
            },
            partial(_onnx, source),
            (last,),
        ),
    ]
    if recipe.evaluate is not None:
        library = native.find()
        material = {
            "evaluate": recipe.evaluate.model_dump(mode="json", exclude={"compare"}),
            "text": source_material(recipe.evaluate.text or SAMPLED_TEXT),
            "library": file_hash(library) if library else None,
        }
        found.append(Stage("evaluate", material, partial(_evaluate, source), ("onnx",)))
        if recipe.evaluate.compare is not None:
            material = {
                "evaluate": recipe.evaluate.model_dump(mode="json"),
                "cache": recipe.cache.model_dump(mode="json"),
                "beam": beam,
            }
            found.append(
                Stage("compare", material, partial(_compare, source), ("traffic", "capture", last, "evaluate"))
            )
    return found


def _traffic(source: Source, context: Context) -> None:
    recipe = source.recipe.traffic
    with context.reporter.task("traffic") as task:
        traffic = build_traffic(
            recipe, source.tokenizer, source.model, progress=lambda what, done, total: task.update(done, total)
        )
    context.unit("ids.npy", lambda path: _save_array(path, traffic.ids))
    context.unit("traffic.json", json_writer({"sha256": traffic.sha256, "stats": traffic.stats}))


def captured_widths(source: Source) -> dict[str, int]:
    """The widest parts, of keys and of values, of which every layer's sub-vectors are multiples."""
    codec = source.recipe.codec
    count = len(source.shapes())
    return {kind: math.gcd(*(codec.side(kind, layer).width for layer in range(count))) for kind in KINDS}


def kept_material(recipe: Recipe) -> dict[str, int] | None:
    """What decides which tokens are kept; None where all are."""
    capture = recipe.capture
    return None if capture.vectors is None else {"vectors": capture.vectors, "seed": capture.seed}


def _capture(source: Source, context: Context) -> None:
    widths = captured_widths(source)
    ids = np.load(context.inputs["traffic"] / "ids.npy", allow_pickle=False)
    settings = CaptureSettings(
        widths["key"],
        widths["value"],
        gradients=source.recipe.codec.weights == "gradient",
        batch=shard_batch(ids.shape[1]),
        rotated_keys=source.recipe.codec.rotated_keys,
        vectors=source.recipe.capture.vectors,
        seed=source.recipe.capture.seed,
        scratch_bytes=source.recipe.capture.scratch_gib << 30,
    )
    with context.reporter.task("capture: sequences", len(ids)) as task:
        spec = source.spec  # before the model is moved: it reads it on the CPU
        count = -(-len(ids) // settings.batch)
        shards, advance = context.world.share(count), context.world.progress(task)
        capture(source.placed_model, spec, ids, settings, context.directory, advance, shards)
        context.world.barrier()
    if context.world.rank == 0:
        await_files([context.directory / shard_file(number) for number in range(count)])


def _finetune(source: Source, context: Context) -> None:
    recipe = source.recipe
    given = recipe.codec.finetune
    assert given is not None
    settings = Finetuning(given.steps, given.batch, given.learning_rate, recipe.codec.beam, recipe.codec.seed)
    ids = torch.from_numpy(np.load(context.inputs["traffic"] / "ids.npy", allow_pickle=False))
    books = load_codebooks(context.inputs["codebooks"] / CODEBOOKS_FILE)
    with context.reporter.task("finetune: steps", given.steps) as task:
        spec = source.spec  # before the model is moved
        tuned, log = finetune(source.placed_model, spec, ids, books, recipe.cache.rule, settings, task.advance)
    tuned = [pair.to("cpu") for pair in tuned]
    context.unit("finetune.json", json_writer(log.to_dict()))
    context.unit(CODEBOOKS_FILE, lambda path: save_codebooks(path, tuned, {}))


def _snap(source: Source, context: Context) -> None:
    books = snap_layers(load_codebooks(context.inputs[last_float(source.recipe)] / CODEBOOKS_FILE))
    context.unit(CODEBOOKS_FILE, lambda path: save_codebooks(path, books, {}))


def last_float(recipe: Recipe) -> str:
    """The stage after which codewords are not trained any more."""
    return "finetune" if recipe.codec.finetune else "codebooks"


def last_training(recipe: Recipe) -> str:
    """The stage that makes the codebooks of the artifact."""
    return SNAPPING if recipe.codec.codewords == "int8" else last_float(recipe)


def _trained(source: Source, context: Context) -> Path:
    return context.inputs[last_training(source.recipe)] / CODEBOOKS_FILE


def _profile(source: Source, context: Context) -> None:
    profile_stage(source, context.inputs["capture"], _trained(source, context), context)


def _onnx(source: Source, context: Context) -> None:
    recipe = source.recipe
    settings = ExportSettings(
        rule=recipe.cache.rule,
        beam=recipe.codec.beam,
        exact_prefill=recipe.cache.prefill == "exact",
        exact_dtype=getattr(torch, recipe.cache.exact_dtype),
        codes_by_head=recipe.cache.codes_by_head,
    )
    with context.reporter.task("onnx: export", 1) as task:
        books = load_codebooks(_trained(source, context))
        export_onnx(source.model, source.spec, books, settings, context.directory, {"recipe": recipe.name})
        task.advance(1)


def evaluation_settings(evaluate_recipe: EvaluateRecipe, recipe: Recipe) -> EvaluationSettings:
    """What the recipe asks for."""
    window, recall = evaluate_recipe.perplexity, evaluate_recipe.recall
    tasks, fidelity = evaluate_recipe.tasks, evaluate_recipe.fidelity
    return EvaluationSettings(
        window_tokens=window.length,
        windows=window.sequences,
        prompt_tokens=given_tokens(window.length, recipe.cache.prefill == "exact"),
        recall_lengths=recall.lengths if recall else (),
        recall_cases=recall.cases if recall else 1,
        tasks=TaskSettings(tasks.names, tasks.lengths, tasks.cases) if tasks else None,
        fidelity=FidelitySettings(**fidelity.model_dump()) if fidelity else None,
    )


def held_out_text(text: TextSource, source: Source, tokens: int) -> str:
    """About ``tokens`` tokens drawn from all over the text, which the evaluation tokenizes again."""
    length = min(tokens, HELD_OUT_LENGTH, source.recipe.export.max_length)
    sequences = -(-tokens // length) + 1  # one more: text can tokenize shorter the second time
    drawn = build_traffic(
        TrafficRecipe(sources=(text,), sequence_length=length, sequences=sequences), source.tokenizer, source.model
    )
    return "\n".join(source.tokenizer.batch_decode(drawn.ids, skip_special_tokens=True))


def _evaluate(source: Source, context: Context) -> None:
    recipe = source.recipe.evaluate
    assert recipe is not None
    settings = evaluation_settings(recipe, source.recipe)
    longest = max((0, *settings.recall_lengths, *(settings.tasks.lengths if settings.tasks else ())))
    tokens = settings.window_tokens * settings.windows + 2 * longest
    if settings.fidelity:
        tokens = max(tokens, settings.fidelity.prompts * settings.fidelity.prompt_tokens)
    text = held_out_text(recipe.text or SAMPLED_TEXT, source, tokens)
    exact, coded = TorchRunner(source.model), OrtRunner(OrtModel(context.inputs["onnx"]))
    found = evaluate_pair(exact, coded, source.tokenizer, text, settings, context.reporter)
    context.unit("evaluation.json", json_writer(found))
    context.unit(TEXT_FILE, lambda path: path.write_bytes(text.encode()))


def _compare(source: Source, context: Context) -> None:
    recipe = source.recipe
    assert recipe.evaluate is not None
    settings, text = evaluation_settings(recipe.evaluate, recipe), (context.inputs["evaluate"] / TEXT_FILE).read_bytes()
    compare_stage(source, EvaluationText("held-out", text.decode(), settings), _trained(source, context), context)


def _save_array(path: Path, array: Any) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)

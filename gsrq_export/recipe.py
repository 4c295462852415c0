"""Recipes: what to build, in YAML. Every fault of a recipe is found, and named, before any work.

Fields and their defaults are the classes below; `load_recipe` refuses unknown and duplicate keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gsrq_export.cache.rule import CODE_TILE, CODEBOOK_SIZE, CacheRule
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.tasks.names import TaskName
from gsrq_export.model.architecture import Architecture
from gsrq_export.recipe_errors import FieldProblem, describe_errors, recipe_error
from gsrq_export.recipe_files import asset_roots, parse_yaml, read_recipe

SLUG = r"^[a-z0-9][a-z0-9._-]{0,62}$"

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class ModelSource(_Section):
    path: Annotated[str, Field(min_length=1)]  # a directory or a hub id
    revision: str | None = None
    streaming: Literal["auto", "always", "never"] = "auto"  # weights stay on disk, see build/streaming.py
    architecture: Architecture | None = None  # what the model must be, see model/architecture.py


class SelfSource(_Section):
    """Text sampled from the model, for users with no data of their own."""

    kind: Literal["self"]
    share: Share = 1.0  # of the sequences, relative to the other sources
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    seed: Seed = 0


class JsonlSource(_Section):
    kind: Literal["jsonl"]
    path: Annotated[str, Field(min_length=1)]
    share: Share = 1.0


class TextSource(_Section):
    """Plain text; documents are separated by a line that holds only U+001E."""

    kind: Literal["text"]
    path: Annotated[str, Field(min_length=1)]  # may be a glob
    share: Share = 1.0


class StdinSource(_Section):
    kind: Literal["stdin"]
    format: Literal["text", "jsonl"] = "text"
    share: Share = 1.0


Source = Annotated[SelfSource | JsonlSource | TextSource | StdinSource, Field(discriminator="kind")]


class TrafficRecipe(_Section):
    sources: Annotated[tuple[Source, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (SelfSource(kind="self"),)
    sequence_length: Annotated[int, Field(ge=16)] = 1024
    sequences: Positive = 64
    recall_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # of sequences that get recall passages
    seed: Seed = 0


class CaptureRecipe(_Section):
    """What is kept of the keys and values that the traffic shows."""

    vectors: Annotated[int, Field(ge=1024)] | None = None  # tokens, a sample of all traffic; none: every token
    seed: Seed = 0  # of the sample
    scratch_gib: Positive = 32  # of disk for hidden states where the weights are streamed; no result depends on it


class CodecSide(_Section):
    """Sub-vectors of ``width`` elements (D), each coded by ``stages`` (R) bytes: 8 R / D bits an element."""

    width: Positive = 128
    stages: Annotated[int, Field(ge=1, le=256)] = 16

    @property
    def nominal_bits(self) -> float:
        return 8 * self.stages / self.width


class LayerBudget(_Section):
    """Sub-vectors and stages of one layer, where they are not those of all layers."""

    layer: Annotated[int, Field(ge=0)]  # counts the layers that own a cache, from 0
    keys: CodecSide | None = None
    values: CodecSide | None = None


class FinetuneRecipe(_Section):
    """Codewords trained further against the model's own logits, see codec/finetune.py."""

    steps: Positive = 100
    batch: Positive = 2  # sequences a step
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.01  # of a stage's root mean square codeword element


class CodecRecipe(_Section):
    method: Literal["gskm", "kmeans", "kmeans-spherical"] = "gskm"
    keys: CodecSide = CodecSide()
    values: CodecSide = CodecSide()
    layers: Annotated[tuple[LayerBudget, ...], BeforeValidator(_as_tuple)] = ()
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    weights: Literal["none", "gradient"] = "none"  # gradient: as published; measured worse, see docs/quality.md
    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    metric: Literal["none", "attention"] = "none"
    key_frame: Literal["pre-rope", "rotated"] = "pre-rope"  # in which keys are coded, see cache/frame.py
    beam: Annotated[int, Field(ge=1, le=CODEBOOK_SIZE)] = 1
    refits: Annotated[int, Field(ge=0, le=10)] = 0  # least-squares refits of all stages, each after encoding anew
    finetune: FinetuneRecipe | None = None
    codewords: Literal["float16", "int8"] = "float16"  # int8: times a power of two a stage, see codec/int8.py
    seed: Seed = 0

    @property
    def rotated_keys(self) -> bool:
        return self.key_frame == "rotated"

    def side(self, kind: str, layer: int) -> CodecSide:
        """The budget of a layer's keys (kind "key") or values ("value"); layers that own a cache count from 0."""
        name = f"{kind}s"
        own = next((getattr(budget, name) for budget in self.layers if budget.layer == layer), None)
        found: CodecSide = own or getattr(self, name)
        return found


class CacheRecipe(_Section):
    sinks: Annotated[int, Field(ge=0)] = 4
    window: Annotated[int, Field(ge=0)] = 64
    block: Positive = 64
    exact_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    prefill: Literal["coded", "exact"] = "coded"
    code_order: Literal["token", "head"] = "token"  # of stored codes, see cache/rule.py; changes no result

    @property
    def codes_by_head(self) -> bool:
        return self.code_order == "head"

    @property
    def rule(self) -> CacheRule:
        return CacheRule(self.sinks, self.window, self.block)


class ExportRecipe(_Section):
    max_length: Positive = 2048  # tokens of prompt and answer together


class PerplexityRecipe(_Section):
    sequences: Positive = 8
    length: Annotated[int, Field(ge=2)] = 1024


class RecallRecipe(_Section):
    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        1024,
    )
    cases: Positive = 16


class TasksRecipe(_Section):
    """Long-context tasks, see docs/evaluation.md."""

    names: Annotated[tuple[TaskName, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    lengths: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        1024,
    )
    cases: Positive = 16


class FidelityRecipe(_Section):
    """How close long generations stay to the unquantized model's."""

    prompts: Positive = 8
    prompt_tokens: Positive = 512
    new_tokens: Positive = 256


class CompareRecipe(_Section):
    """Rival quantizers (ids of `gsrq compare`) measured beside the artifact's codec, for its report."""

    methods: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "fp8",
        "int4",
        "kivi-2",
        "turboquant-2",
    )
    prefixes: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_as_tuple)
    ] = ()  # shares of our stages that are measured too


class EvaluateRecipe(_Section):
    perplexity: PerplexityRecipe = PerplexityRecipe()
    recall: RecallRecipe | None = None
    tasks: TasksRecipe | None = None
    fidelity: FidelityRecipe | None = None
    compare: CompareRecipe | None = None
    text: Source | None = None  # held-out text; none: sampled from the model


class TritonRecipe(_Section):
    name: Annotated[str, Field(pattern=SLUG)] | None = None  # of the served model; none: the recipe's
    max_batch_size: Positive = 8
    max_sequences: Annotated[int, Field(ge=1, le=1 << 20)] = 32  # that live on the server at once
    # The custom-op library's path on the server. None: the onnxruntime backend runs the graph's function of standard
    # operators, the python backend the library that `gsrq plugins build` made there.
    op_library: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+@-]{1,255}$")] | None = None


class Recipe(_Section):
    name: Annotated[str, Field(pattern=SLUG)]
    model: ModelSource
    traffic: TrafficRecipe = TrafficRecipe()
    capture: CaptureRecipe = CaptureRecipe()
    codec: CodecRecipe = CodecRecipe()
    cache: CacheRecipe = CacheRecipe()
    export: ExportRecipe = ExportRecipe()
    evaluate: EvaluateRecipe | None = EvaluateRecipe()
    triton: TritonRecipe = TritonRecipe()

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        problems = _disagreements(self)
        if problems:
            raise ValueError(problems)
        return self

    @property
    def texts(self) -> tuple[Source, ...]:
        """All sources of text, for calibration and evaluation."""
        held_out = self.evaluate.text if self.evaluate else None
        return (*self.traffic.sources, *([held_out] if held_out else []))

    @property
    def nominal_bits(self) -> float:
        """Bits an element, codes alone, keys and values together, of a layer without a budget of its own."""
        return (self.codec.keys.nominal_bits + self.codec.values.nominal_bits) / 2


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe and the files it extends; relative paths are resolved, so it means the same anywhere.

    Raises:
        GsrqError: unreadable, not YAML, or with any fault; all faults are listed with field, value and mend.
    """
    path = Path(path)
    return validate_recipe(read_recipe(path), str(path), path.resolve().parent)


def parse_recipe(text: str, name: str, directory: Path | None) -> Recipe:
    """A recipe from its YAML text, which must stand alone.

    Args:
        name: for messages.
        directory: where its relative paths start; None leaves them as they are and touches no file.
    """
    return validate_recipe(parse_yaml(text, name), name, directory)


def validate_recipe(data: dict[str, Any], name: str, directory: Path | None) -> Recipe:
    """A recipe from its keys and values; see `parse_recipe`."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise recipe_error(name, describe_errors(error, data, Recipe)) from None
    return recipe if directory is None else _resolved(recipe, directory)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; `parse_recipe` gives an equal recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_path(value: str, directory: Path) -> str:
    """An absolute path for a relative one (or glob) that exists under the recipe's directory or an asset root.

    One that exists nowhere is returned as the recipe's directory would have it.
    """
    try:
        given = Path(value).expanduser()
    except RuntimeError as error:  # ~user without a home
        raise GsrqError(f"path {value!r}: {error}", "write it from / on") from None
    if given.is_absolute():
        return str(given)
    for root in (directory, *asset_roots()):
        if (root / given).exists() or (_is_glob(value) and next(root.glob(value), None) is not None):
            return str((root / given).resolve()) if not _is_glob(value) else str(root / given)
    return str(directory / given)


def check_against(recipe: Recipe, heads: Sequence[tuple[int, int]], max_position: int) -> None:
    """Refuse a recipe that a model cannot follow.

    Args:
        heads: (num_kv_heads, head_dim) of each layer that owns a cache.
        max_position: positions the model knows; 0 where it states none.
    Raises:
        GsrqError: all faults, each with field, value and what would be allowed.
    """
    problems = []
    own = {budget.layer: i for i, budget in enumerate(recipe.codec.layers)}
    for layer, (num_kv_heads, head_dim) in enumerate(heads):
        total = num_kv_heads * head_dim
        allowed = [w for w in range(1, total + 1) if total % w == 0 and (head_dim % w == 0 or w % head_dim == 0)]
        for kind in ("key", "value"):
            width = recipe.codec.side(kind, layer).width
            if width not in allowed:
                budget = recipe.codec.layers[own[layer]] if layer in own else None
                named = budget is not None and getattr(budget, f"{kind}s") is not None
                problem = FieldProblem(
                    f"codec.layers.{own[layer]}.{kind}s.width" if named else f"codec.{kind}s.width",
                    width,
                    f"does not cut {num_kv_heads} KV heads of {head_dim} into equal sub-vectors along heads",
                    f"use one of {', '.join(map(str, allowed))}",
                )
                if problem not in problems:
                    problems.append(problem)
    for layer, i in own.items():
        if layer >= len(heads):
            problems.append(
                FieldProblem(
                    f"codec.layers.{i}.layer",
                    layer,
                    f"the model has {len(heads)} layers with a cache",
                    f"use 0 to {len(heads) - 1}",
                )
            )
    lengths = [
        ("export.max_length", recipe.export.max_length),
        ("traffic.sequence_length", recipe.traffic.sequence_length),
    ]
    for field, length in lengths:
        if max_position and length > max_position:
            problems.append(
                FieldProblem(field, length, f"the model has {max_position} positions", f"use at most {max_position}")
            )
    if problems:
        raise recipe_error(recipe.name, problems)


def _disagreements(recipe: Recipe) -> list[FieldProblem]:
    """Faults between fields that need no model to be seen."""
    problems = []
    cache, limit, traffic = recipe.cache, recipe.export.max_length, recipe.traffic
    first = cache.sinks + cache.window + cache.block
    if first > limit:
        problems.append(
            FieldProblem(
                "cache.window",
                cache.window,
                f"nothing is ever coded: sinks + window + block is {first}, export.max_length {limit}",
                f"lower sinks, window or block until they add up to at most {limit}, or raise export.max_length",
            )
        )
    if cache.codes_by_head and cache.block % CODE_TILE:
        problems.append(
            FieldProblem(
                "cache.block",
                cache.block,
                f"cache.code_order: head stores codes in tiles of {CODE_TILE} tokens",
                f"use a multiple of {CODE_TILE}, or code_order: token",
            )
        )
    budgets = [budget.layer for budget in recipe.codec.layers]
    for i, layer in enumerate(budgets):
        if layer in budgets[:i]:
            problems.append(
                FieldProblem(f"codec.layers.{i}.layer", layer, "has a budget already", "keep one entry a layer")
            )
    triton = recipe.triton
    if triton.max_sequences < triton.max_batch_size:
        problems.append(
            FieldProblem(
                "triton.max_sequences",
                triton.max_sequences,
                f"is below triton.max_batch_size, {triton.max_batch_size}",
                "allow at least as many sequences as fit a batch",
            )
        )
    finetune = recipe.codec.finetune
    if finetune and traffic.sequences < 2:
        problems.append(
            FieldProblem(
                "traffic.sequences", traffic.sequences, "fine-tuning keeps one back to measure", "use 2 or more"
            )
        )
    if finetune and traffic.sequence_length <= first:
        problems.append(
            FieldProblem(
                "traffic.sequence_length",
                traffic.sequence_length,
                f"fine-tuning would see no coded token: sinks + window + block is {first}",
                f"use more than {first}",
            )
        )
    tokens = traffic.sequences * traffic.sequence_length
    if tokens < CODEBOOK_SIZE:
        problems.append(
            FieldProblem(
                "traffic.sequences",
                traffic.sequences,
                f"{tokens} tokens of traffic cannot train {CODEBOOK_SIZE} codewords",
                "raise sequences or sequence_length; 250000 tokens or more is usual",
            )
        )
    evaluate = recipe.evaluate
    lengths: list[tuple[str, int]] = []
    if evaluate:
        lengths.append(("evaluate.perplexity.length", evaluate.perplexity.length))
    if evaluate and evaluate.recall:
        lengths += [(f"evaluate.recall.lengths.{i}", n) for i, n in enumerate(evaluate.recall.lengths)]
    if evaluate and evaluate.tasks:
        lengths += [(f"evaluate.tasks.lengths.{i}", n) for i, n in enumerate(evaluate.tasks.lengths)]
    if evaluate and evaluate.fidelity:
        both = evaluate.fidelity.prompt_tokens + evaluate.fidelity.new_tokens
        lengths.append(("evaluate.fidelity.prompt_tokens + new_tokens", both))
    for field, length in lengths:
        if length > limit:
            problems.append(
                FieldProblem(field, length, f"over export.max_length {limit}", "lower it or raise export.max_length")
            )
    stdin = [s for s in recipe.texts if isinstance(s, StdinSource)]
    if len(stdin) > 1:
        problems.append(
            FieldProblem("traffic.sources", len(stdin), "stdin can be read only once", "keep one stdin source")
        )
    return problems


def _resolved(recipe: Recipe, directory: Path) -> Recipe:
    def source(given: Any) -> Any:
        return (
            given.model_copy(update={"path": resolve_path(given.path, directory)}) if hasattr(given, "path") else given
        )

    model = recipe.model
    path = resolve_path(model.path, directory)
    if Path(path).exists() or not _is_hub_id(model.path):
        model = model.model_copy(update={"path": path})
    traffic = recipe.traffic.model_copy(update={"sources": tuple(source(s) for s in recipe.traffic.sources)})
    evaluate = recipe.evaluate and recipe.evaluate.model_copy(update={"text": source(recipe.evaluate.text)})
    return recipe.model_copy(update={"model": model, "traffic": traffic, "evaluate": evaluate})


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")

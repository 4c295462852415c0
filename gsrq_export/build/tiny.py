"""`gsrq build --tiny`: the same recipe on a random model of the same architecture, a few thousand times smaller.

It shows in seconds that an architecture, a recipe and this machine go together; what it builds speaks no language.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gsrq_export.artifact.staging import staging_directory
from gsrq_export.errors import GsrqError
from gsrq_export.model.architecture import CACHE_FIELDS, Architecture, RopeScaling, architecture_of
from gsrq_export.model.byte_tokenizer import VOCABULARY, byte_tokenizer
from gsrq_export.model.loading import load_config, model_directory
from gsrq_export.recipe import (
    CodecRecipe,
    CodecSide,
    FinetuneRecipe,
    LayerBudget,
    PerplexityRecipe,
    Recipe,
    SelfSource,
    TrafficRecipe,
)
from gsrq_export.stages.storage import move_to_free_place

LAYERS = 2  # of each kind, where kinds of layers take turns
HEADS = 2  # KV heads, and at most so many query heads a KV head
SHRINK = 4  # times smaller heads and sub-vectors, and fewer stages: the bits stay, but for rounding to whole stages
SEQUENCES = 8
TOKENS = 512  # of traffic at least
SPARE = 7  # tokens that a model type's tokenizer class may add
WEIGHT_SCALE = 1.5  # of a matrix of unit gain: attention is far from uniform
VERSION = 1  # of how the model is drawn


def tiny_recipe(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with everything smaller, on a model that is drawn into ``directory`` if it is not there yet.

    Kept: the model type with its kinds of layers, scalings and caps, the cache rule, all of the codec but its sizes.

    Raises:
        GsrqError: the recipe states no architecture and its model has no config.json at hand; or such a model
            cannot be drawn.
    """
    given = recipe.model.architecture or architecture_of(load_config(model_directory(recipe.model.path)))
    rule = recipe.cache.rule
    length = rule.sinks + rule.window + 2 * rule.block  # two blocks are coded
    architecture = tiny_architecture(given, recipe.codec, length)
    path = directory / f"tiny-{_digest(architecture)}"
    if not path.is_dir():
        _draw(architecture, path)
    traffic = TrafficRecipe(
        sources=(SelfSource(kind="self"),),
        sequences=max(SEQUENCES, -(-TOKENS // length)),
        sequence_length=max(length, 16),
    )
    evaluate = recipe.evaluate and recipe.evaluate.model_copy(
        update={
            "perplexity": PerplexityRecipe(sequences=2, length=length),
            **dict.fromkeys(("recall", "tasks", "fidelity", "compare", "text")),
        }
    )
    changed = recipe.model_copy(
        update={
            "name": f"{recipe.name[:58]}-tiny",
            "model": recipe.model.model_copy(
                update={"path": str(path), "revision": None, "architecture": architecture, "streaming": "auto"}
            ),
            "traffic": traffic,
            "codec": _codec(recipe.codec, given, architecture),
            "export": recipe.export.model_copy(update={"max_length": length}),
            "evaluate": evaluate,
        }
    )
    return Recipe.model_validate(changed.model_dump(mode="json"))


def tiny_architecture(given: Architecture, codec: CodecRecipe, length: int) -> Architecture:
    """The same kind of decoder with ``length`` positions; as many KV heads as the widest sub-vector covers."""
    widest = max(
        side.width
        for layer in [-1, *(budget.layer for budget in codec.layers)]
        for side in (codec.side("key", layer), codec.side("value", layer))
    )
    kv_heads = min(given.num_key_value_heads, max(HEADS, -(-widest // given.head_dim)))
    heads = kv_heads * min(HEADS, given.num_attention_heads // given.num_key_value_heads)
    head_dim = max(4, given.head_dim // SHRINK // 2 * 2)
    part = length / given.max_position_embeddings
    scaling = given.rope_scaling
    if scaling and scaling.original_max_position_embeddings:
        original = max(8, round(scaling.original_max_position_embeddings * part))
        scaling = RopeScaling(**{**scaling.model_dump(), "original_max_position_embeddings": original})
    sliding, scalar = given.sliding_window, given.query_pre_attn_scalar
    return Architecture(
        model_type=given.model_type,
        num_hidden_layers=min(LAYERS, given.num_hidden_layers),
        hidden_size=heads * head_dim,
        intermediate_size=2 * heads * head_dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=VOCABULARY + SPARE,
        max_position_embeddings=length,
        rope_theta=given.rope_theta,
        rope_scaling=scaling,
        partial_rotary_factor=given.partial_rotary_factor,
        sliding_window=None if sliding is None else max(8, round(sliding * part)),
        attn_logit_softcapping=given.attn_logit_softcapping,
        final_logit_softcapping=given.final_logit_softcapping,
        query_pre_attn_scalar=None if scalar is None else max(1, round(scalar * head_dim / given.head_dim)),
        tie_word_embeddings=given.tie_word_embeddings,
    )


def _codec(codec: CodecRecipe, given: Architecture, tiny: Architecture) -> CodecRecipe:
    total = tiny.num_key_value_heads * tiny.head_dim
    widths = [w for w in range(1, total + 1) if total % w == 0 and (tiny.head_dim % w == 0 or w % tiny.head_dim == 0)]

    def smaller(side: CodecSide) -> CodecSide:
        wanted = side.width * tiny.head_dim / given.head_dim
        width = min(widths, key=lambda w: abs(math.log(w / wanted)))
        return CodecSide(width=width, stages=max(1, round(side.stages * width / side.width)))

    layers = tuple(
        LayerBudget(
            layer=budget.layer,
            keys=budget.keys and smaller(budget.keys),
            values=budget.values and smaller(budget.values),
        )
        for budget in codec.layers
        if budget.layer < tiny.num_hidden_layers
    )
    return codec.model_copy(
        update={
            "keys": smaller(codec.keys),
            "values": smaller(codec.values),
            "layers": layers,
            "iterations": min(2, codec.iterations),
            "finetune": codec.finetune and FinetuneRecipe(steps=2, batch=1),
        }
    )


def transformers_config(architecture: Architecture) -> Any:
    """A transformers configuration of a drawn model.

    Raises:
        GsrqError: transformers does not know the model type, or does not make what the architecture says of it.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    fields = architecture.model_dump(exclude={"model_type", "rope_theta", "rope_scaling", "partial_rotary_factor"})
    scaling = architecture.rope_scaling
    if scaling:
        rope |= scaling.model_dump(exclude_none=True)
        if scaling.original_max_position_embeddings:
            fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        if scaling.rope_type == "longrope":
            rope |= _longrope(architecture)
    if architecture.partial_rotary_factor != 1.0:
        rope["partial_rotary_factor"] = architecture.partial_rotary_factor
    fields = {name: value for name, value in fields.items() if value is not None}
    fields.setdefault("sliding_window", None)  # some model types have one by default
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    try:
        config = AutoConfig.for_model(architecture.model_type, **fields, **tokens, rope_parameters=rope)
        made = architecture_of(config)
    except Exception as error:  # whatever a model type has against these fields
        raise GsrqError(
            f"--tiny: no model of type {architecture.model_type} can be drawn: {error}", "build with the model itself"
        ) from error
    different = [name for name in CACHE_FIELDS if getattr(made, name) != getattr(architecture, name)]
    if different:
        raise GsrqError(
            f"--tiny: a drawn model of type {architecture.model_type} would differ in {', '.join(different)}",
            "build with the model itself",
        )
    return config


def _longrope(architecture: Architecture) -> dict[str, list[float]]:
    """Factors as longrope has them: rising, from none for the fastest pairs to the whole extension for the slowest."""
    scaling = architecture.rope_scaling
    assert scaling
    extension = architecture.max_position_embeddings / (scaling.original_max_position_embeddings or 1)
    pairs = int(architecture.head_dim * architecture.partial_rotary_factor) // 2
    return {
        "short_factor": _steps(1.0, 1.25, pairs),
        "long_factor": _steps(1.0, max(extension, 1.25), pairs),
    }


def _steps(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


@torch.no_grad()
def _draw(architecture: Architecture, path: Path) -> None:
    """Write a random model and a tokenizer of one token a byte; the same for the same architecture."""
    config = transformers_config(architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_directory(path) as building:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            embeddings: Sequence[torch.Tensor] = (
                model.get_input_embeddings().weight,
                model.get_output_embeddings().weight,
            )
            for weight in model.parameters():
                if any(weight is table for table in embeddings):
                    continue  # as transformers draws them: logits of sampled text stay small
                if weight.ndim == 2:
                    weight.normal_(0, WEIGHT_SCALE / weight.shape[1] ** 0.5)
                else:
                    weight.add_(0.1 * torch.randn_like(weight))  # norms and biases that do something
        model.save_pretrained(building)
        byte_tokenizer().save_pretrained(building)
        move_to_free_place(building, path)  # a build beside this one has drawn the same


def _digest(architecture: Architecture) -> str:
    return hashlib.sha256(f"{VERSION}{architecture.model_dump_json()}".encode()).hexdigest()[:16]

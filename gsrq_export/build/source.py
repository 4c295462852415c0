"""What a build starts from: the recipe, and the model it names, loaded when first needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gsrq_export.accounting import LayerShape
from gsrq_export.baselines.methods import chosen
from gsrq_export.build.device import CPU, check_device, describe_device
from gsrq_export.build.streaming import Residence, check_streamed, require_whole
from gsrq_export.model.introspect import ModelSpec, inspect_model
from gsrq_export.model.loading import (
    TOKENIZER_FILES,
    load_config,
    load_model,
    model_directory,
    weight_files,
    weight_hash,
)
from gsrq_export.model.streaming import load_streamed, streamed_weights
from gsrq_export.recipe import Recipe, check_against
from gsrq_export.stages.keys import file_hash


@dataclass(frozen=True)
class Source:
    """A recipe and its model. Nothing is read before it is asked for, and nothing twice.

    Attributes:
        device: where the model and the codec calculate, "cpu", "cuda" or "cuda:N".
        parallel: what many processes share, "codebooks" or the "rows" of each (build/codebooks.py).
    """

    recipe: Recipe
    device: str = CPU
    parallel: str = "codebooks"

    @cached_property
    def directory(self) -> Path:
        return model_directory(self.recipe.model.path, self.recipe.model.revision)

    @cached_property
    def weight_hash(self) -> str:
        return weight_hash(self.directory)

    @cached_property
    def tokenizer_hashes(self) -> dict[str, str]:
        """sha256 of each tokenizer and configuration file there is."""
        files = [self.directory / name for name in TOKENIZER_FILES]
        return {file.name: file_hash(file) for file in files if file.is_file()}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_streamed(self.directory) if self.residence.streamed else load_model(self.directory)

    @cached_property
    def residence(self) -> Residence:
        """Whether the weights are in memory or streamed."""
        return Residence.choose(self.recipe, self.directory, self.place)

    @property
    def model(self) -> Any:
        """On the CPU, wherever it was. Where it is streamed it can be run and exported, a layer in memory at a time."""
        return self._on(torch.device(CPU))

    @property
    def placed_model(self) -> Any:
        """The same model, moved to ``device`` until ``model`` is asked for again."""
        return self._on(self.place)

    def _on(self, device: torch.device) -> Any:
        model = self._loaded[0]
        streamed = streamed_weights(model)
        if streamed is None:
            return model.to(device)
        streamed.place(device)
        return model

    @property
    def place(self) -> torch.device:
        return check_device(self.device)

    @cached_property
    def calculated_on(self) -> dict[str, str]:
        """What keys of stages hold of the device, as GPUs round differently; nothing of the CPU."""
        return {} if self.device == CPU else describe_device(self.device)

    @property
    def reduced(self) -> dict[str, str]:
        """What keys and the manifest hold of the order in which sums over rows are taken; nothing of the usual one."""
        return {} if self.parallel == "codebooks" else {"parallel": self.parallel}

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def spec(self) -> ModelSpec:
        """What the model's attention is, by running it."""
        spec = inspect_model(self.model, self.recipe.export.max_length)
        check_against(self.recipe, [(layer.num_kv_heads, layer.head_dim) for layer in spec.layers], self._positions)
        return spec

    @cached_property
    def _config(self) -> Any:
        return load_config(self.directory)

    @property
    def _positions(self) -> int:
        return int(getattr(self._config.get_text_config(), "max_position_embeddings", 0) or 0)

    def shapes(self) -> Sequence[LayerShape]:
        """The layers' shapes as the configuration states them; the model itself is not loaded."""
        config = self._config.get_text_config()
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return [LayerShape(kv_heads, head_dim)] * int(config.num_hidden_layers)

    def stated_shapes(self) -> Sequence[LayerShape]:
        """The layers' shapes as the recipe states them; where it does not, the model's."""
        architecture = self.recipe.model.architecture
        if architecture is None:
            return self.shapes()
        return [LayerShape(*architecture.kv_shape)] * architecture.num_hidden_layers

    def check(self, whole_for: str | None = None) -> None:
        """Everything that can be refused without loading weights.

        Args:
            whole_for: the command that runs the whole model, which therefore must fit into memory; None: a build, whose
                recipe says what is run.
        """
        check_device(self.device)
        if self.recipe.evaluate and self.recipe.evaluate.compare:
            chosen(self.recipe.evaluate.compare.methods)  # refuses ids that there are not
        if self.recipe.model.architecture is not None:
            check_stated(self.recipe)  # before anything is fetched
        weight_files(self.directory)
        if self.recipe.model.architecture is not None:
            self.recipe.model.architecture.check_model(self._config, self.recipe.name)
        check_against(self.recipe, [(shape.num_kv_heads, shape.head_dim) for shape in self.shapes()], self._positions)
        if whole_for is not None:
            require_whole(self.recipe, self.residence, whole_for)
        check_streamed(self.recipe, self.residence)
        if self.residence.streamed:
            self._loaded  # noqa: B018  (a model without its weights, which shows whether they fit it)


def check_stated(recipe: Recipe) -> None:
    """Refuse a recipe that the architecture it states cannot follow."""
    architecture = recipe.model.architecture
    if architecture is not None:
        heads = [architecture.kv_shape] * architecture.num_hidden_layers
        check_against(recipe, heads, architecture.max_position_embeddings)

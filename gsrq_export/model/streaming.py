"""A model whose weights stay in its safetensors files until they are needed, so that memory holds a layer, not all.

The modules are built with parameters on torch's meta device. A hook on each module that owns parameters reads
them before its forward and drops them after it, so the model runs as any other does, one module's weights at a time;
autograd keeps those that a backward needs. What runs more than once is kept for that long (``StreamedWeights.kept``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.model.checkpoint import Checkpoint
from gsrq_export.model.loading import load_config, load_tokenizer

SMALL = 1024  # elements; an exporter may look at the values of such tensors, so placeholders are never of them
_ATTRIBUTE = "_gsrq_streamed"
WHOLE = "set model.streaming: never, which needs memory for the whole model in float32"


class StreamedWeights:
    """Gives a model of meta parameters its weights, a module at a time.

    Attributes:
        checkpoint: where they lie.
        names: the tensor in the checkpoint of each parameter, by the parameter's name; tied ones name the same.
        device: on which the model calculates.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        """Hooks itself to the model.

        Raises:
            GsrqError: a tensor is missing, of another shape than the model's, or quantized.
        """
        self.checkpoint = checkpoint
        self.device = torch.device("cpu")
        self.names = _stored_names(model, checkpoint)
        self._model = model
        self._kept: set[torch.nn.Module] = set()
        self._paths = {module: path for path, module in model.named_modules()}
        owned = {m: {name: p for name, p in m._parameters.items() if p is not None} for m in self._paths}
        self._meta = {module: parameters for module, parameters in owned.items() if parameters}
        for module in self._meta:
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None  # of gradients alone, and held against the number of rows, which changes
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after, always_call=True)
        object.__setattr__(model, _ATTRIBUTE, self)

    def place(self, device: torch.device | str) -> None:
        """Calculate on ``device`` from now on. Buffers, of rotary embeddings for instance, are moved there."""
        self.device = torch.device(device)
        for module in self._paths:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def kept(self, module: torch.nn.Module) -> Iterator[None]:
        """Within the context all weights under ``module`` are in memory."""
        owners = [m for m in module.modules() if m in self._meta and m not in self._kept]
        try:
            for owner in owners:
                self._fill(owner)
                self._kept.add(owner)
            yield
        finally:
            for owner in owners:
                self._kept.discard(owner)
                self._empty(owner)

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """Within the context parameters are tensors of the right shape and type that take no memory, for tracing.

        Their values are meaningless, but for tensors of ``SMALL`` elements or fewer, which are read. Tied parameters
        are one object.
        """
        made: dict[str, torch.nn.Parameter] = {}
        try:
            for owner, parameters in self._meta.items():
                for name in parameters:
                    stored = self._name(owner, name)
                    if stored not in made:
                        made[stored] = _frozen(_placeholder(self.checkpoint, stored))
                    owner._parameters[name] = made[stored]
                self._kept.add(owner)
            yield
        finally:
            self._kept.clear()
            for owner in self._meta:
                self._empty(owner)

    def weight(self, parameter: str) -> torch.Tensor:
        """One parameter by the model's name for it, float32 on the CPU."""
        return self.checkpoint.read(self.names[parameter])

    def _name(self, module: torch.nn.Module, name: str) -> str:
        path = self._paths[module]
        return self.names[f"{path}.{name}" if path else name]

    def _fill(self, module: torch.nn.Module) -> None:
        for name in self._meta[module]:
            module._parameters[name] = _frozen(self.checkpoint.read(self._name(module, name)).to(self.device))

    def _empty(self, module: torch.nn.Module) -> None:
        module._parameters.update(self._meta[module])

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if module in self._kept:
            return None
        if isinstance(module, torch.nn.Embedding):  # only the rows that are looked up are read
            ids, *rest = args
            index, inverse = ids.cpu().unique(return_inverse=True)
            rows = self.checkpoint.rows(self._name(module, "weight"), index)
            module._parameters["weight"] = _frozen(rows.to(self.device))
            return (inverse.to(self.device), *rest)
        self._fill(module)
        return None

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if module not in self._kept:
            self._empty(module)


def streamed_weights(model: torch.nn.Module) -> StreamedWeights | None:
    """The weights of a model that ``load_streamed`` made; None for one that is in memory."""
    return getattr(model, _ATTRIBUTE, None)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model calculates."""
    streamed = streamed_weights(model)
    return streamed.device if streamed else next(model.parameters()).device


def load_streamed(directory: Path) -> tuple[Any, Any]:
    """As ``load_model``, but the weights stay on disk: a causal decoder that calculates in float32, and its tokenizer.

    Raises:
        GsrqError: damaged or incomplete weights, an unknown architecture, a wrong tokenizer.
        UnsupportedModelError: a checkpoint that has to be converted as a whole.
    """
    checkpoint = Checkpoint(directory)
    checkpoint.tensors  # noqa: B018  (refuses damaged files first)
    config = load_config(directory)
    tokenizer = load_tokenizer(directory, config.get_text_config().vocab_size)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{directory}: a quantized checkpoint cannot be streamed", WHOLE)
    try:
        with _meta_parameters():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedModelError(f"{directory}: {error}", "use a decoder-only language model") from error
    if any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model, add_legacy=False)):
        raise UnsupportedModelError(
            f"{directory}: weights of type {config.model_type} are put together from several tensors when they are "
            "loaded, so they cannot be streamed",
            WHOLE,
        )
    model.eval().requires_grad_(False)
    StreamedWeights(model, checkpoint)
    return model, tokenizer


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules made within the context have their parameters on the meta device; buffers are made as always."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _frozen(parameter.detach().to("meta")))

    with patch.object(torch.nn.Module, "register_parameter", on_meta):
        yield


def _stored_names(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    tied = _tied_names(model, checkpoint)
    names, missing = {}, []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = tied.get(name, name)
        if stored not in checkpoint.tensors:
            missing.append(name)
            continue
        shape = checkpoint.tensors[stored].shape
        if shape != tuple(parameter.shape):
            raise GsrqError(
                f"weight {stored} has shape {list(shape)}, the model's {name} {list(parameter.shape)}",
                "use the config.json that belongs to the weights",
            )
        checkpoint.check_type(stored)
        names[name] = stored
    missing += [
        name
        for path, module in model.named_modules()
        for short in module._buffers
        if short not in module._non_persistent_buffers_set
        for name in [f"{path}.{short}" if path else short]
    ]
    if missing:
        raise GsrqError(
            f"the weights lack {len(missing)} tensors of the model under its names for them, the first {missing[0]}",
            f"download the model again; if its tensors have other names, {WHOLE}",
        )
    return names


def _tied_names(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor that tied parameters are read from: whichever of the two is stored, and both are where they differ."""
    found, stored = {}, checkpoint.tensors
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target not in stored:
            found[target] = source
        elif source not in stored:
            found[source] = target
        elif stored[target].shape == stored[source].shape and all(
            torch.equal(a, b) for a, b in zip(checkpoint.chunks(target), checkpoint.chunks(source), strict=True)
        ):
            found[target] = source
    return found


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _placeholder(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    stored = checkpoint.tensors[name]
    if stored.elements <= SMALL:
        return checkpoint.read(name)
    return torch.full((), torch.nan).expand(stored.shape)

"""A decoder cut into what comes before its layers, each layer, and what comes after, so that each can be run alone.

The cut is at transformers' own layers for gradient checkpointing, and nothing is copied: the model's forward is run
with its layers' forwards replaced, so whatever a family does around its layers is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from gsrq_export.errors import UnsupportedModelError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to a layer beside the hidden states: positions, masks."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Reached(Exception):
    """The last layer was called; what comes after need not run."""


class CutModel:
    """Runs a decoder's parts.

    Raises (on construction and by ``before``):
        UnsupportedModelError: the layers are no chain, each of which takes the hidden states of the one before.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not self.layers:
            raise self._no_chain("it has no layers that transformers can checkpoint")

    def before(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """The first layer's hidden states [B, T, H], and each layer's other arguments. ids: int64 [B, T]."""
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []

        def note(index: int) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                if index != len(calls) or not args or not isinstance(args[0], torch.Tensor):
                    raise self._no_chain("its layers do not run once each, in order, on hidden states")
                if index and args[0] is not first[0]:
                    raise self._no_chain("a layer's hidden states are not what the one before gives")
                first.append(args[0])
                calls.append(LayerCall(args[1:], kwargs))
                if index == len(self.layers) - 1:
                    raise _Reached
                return args[0]

            return forward

        with self._replaced(note):
            try:
                self.model(input_ids=ids, use_cache=False)
            except _Reached:
                return first[0], calls
        raise self._no_chain("its last layer was not reached")

    def run(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """A layer's hidden states [B, T, H] from those before it."""
        out = self.layers[index](hidden, *call.args, **call.kwargs)
        if not isinstance(out, torch.Tensor) or out.shape != hidden.shape:
            raise self._no_chain("a layer gives more than hidden states")
        return out

    def after(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] from the last layer's hidden states."""

        def skip(index: int) -> Forward:
            return lambda states, *args, **kwargs: states if index else hidden

        with self._replaced(skip):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    @contextmanager
    def _replaced(self, forward: Callable[[int], Forward]) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(patch.object(layer, "forward", forward(index)))
            yield

    def _no_chain(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} cannot be run layer by layer: {why}", "set model.streaming: never"
        )

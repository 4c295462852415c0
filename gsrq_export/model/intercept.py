"""Take over the attention of any transformers decoder, before its rotary embedding.

The model's own rotary function is replaced by one that passes queries and keys through, and an
attention function of ours receives them: no layer is named and no module is copied. Both the attention
and the mask function are registered under our name; without the latter causality would be lost.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from gsrq_export.errors import UnsupportedModelError

IMPLEMENTATION = "gsrq"
ROTARY_FUNCTION = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class RotaryCall:
    """What the model asked of its rotary function in a layer."""

    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    cos: torch.Tensor
    sin: torch.Tensor
    width: int  # elements of the last axis of the query it was given


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as the model would have computed it.

    Attributes:
        module: the attention module.
        layer_idx: its index among the model's layers.
        query: [B, num_heads, T, head_dim], before RoPE.
        key, value: [B, num_kv_heads, T, head_dim], key before RoPE (after q/k normalisation).
        scale: factor on the scores.
        softcap: cap on the scores, 0 for none.
        sliding_window: tokens that a query sees, 0 for all.
        mask: bool [B, past + T], False for padding; None where nothing is padded.
        position_ids: int64 [B or 1, T], where the model passes them.
        rotary: the rotary call that this one stands for.
    """

    module: torch.nn.Module
    layer_idx: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float
    sliding_window: int
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    rotary: RotaryCall


Handler = Callable[[AttentionCall], torch.Tensor]


class _Active(threading.local):
    """The interception of this thread, so that two models can be served from two threads."""

    handler: Handler | None = None
    rotary: RotaryCall | None = None


_active = _Active()


@contextmanager
def intercept(model: torch.nn.Module, handler: Handler) -> Iterator[None]:
    """Within the context every attention of ``model`` is computed by ``handler``.

    The handler returns [B, T, num_heads, head_dim]. The model's attention implementation and rotary
    function are restored on exit, also after an error.

    Raises:
        UnsupportedModelError: the model has no rotary function to take over, or (when run) a layer
            whose attention is not plain multi-head or grouped-query attention over rotated keys.
    """
    if _active.handler is not None:
        raise RuntimeError("attention is already intercepted in this thread")
    modules = [sys.modules[name] for name in {type(m).__module__ for m in model.modules()}]
    rotary = [m for m in modules if callable(getattr(m, ROTARY_FUNCTION, None))]
    if not rotary:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no function {ROTARY_FUNCTION}",
            "GSRQ needs a decoder with rotary position embeddings from transformers",
        )
    before = getattr(model.config, "_attn_implementation", None) or "sdpa"
    with ExitStack() as stack:
        for module in rotary:
            stack.enter_context(patch.object(module, ROTARY_FUNCTION, _pass_through(getattr(module, ROTARY_FUNCTION))))
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        stack.callback(model.set_attn_implementation, before)  # type: ignore[arg-type]
        stack.callback(setattr, _active, "handler", None)
        stack.callback(setattr, _active, "rotary", None)
        _active.handler = handler
        yield


def _pass_through(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _active.handler is None:  # another model of the same family, in another thread
            return original(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
        _active.rotary = RotaryCall(original, cos, sin, q.shape[-1])
        return q, k

    return rotary


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers: checks the call, then asks the handler."""
    handler, rotary = _active.handler, _active.rotary
    _active.rotary = None
    layer = getattr(module, "layer_idx", None)
    where = f"{type(module).__name__} of layer {layer}"
    if handler is None:
        raise RuntimeError("the gsrq attention is set on a model outside gsrq_export's contexts")
    if layer is None:
        raise UnsupportedModelError(f"{where} has no layer_idx", "only decoders from transformers are supported")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise UnsupportedModelError(
            f"{where}: head_dim of query {query.shape[-1]}, key {key.shape[-1]} and value {value.shape[-1]} differ "
            "(multi-head latent attention)",
            "use a model with multi-head or grouped-query attention",
        )
    if rotary is None:
        raise UnsupportedModelError(
            f"{where} attends without a rotary embedding",
            "every layer that owns a cache must use RoPE",
        )
    extra = sorted(name for name in ("s_aux", "sinks", "head_mask", "position_bias") if kwargs.get(name) is not None)
    if extra or getattr(module, "is_causal", True) is False:
        what = f"passes {', '.join(extra)} to its attention" if extra else "is not causal"
        raise UnsupportedModelError(f"{where} {what}", "this attention variant is not supported")
    call = AttentionCall(
        module=module,
        layer_idx=int(layer),
        query=query,
        key=key,
        value=value,
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        softcap=float(softcap or 0.0),
        sliding_window=int(sliding_window or 0),
        mask=attention_mask,
        position_ids=position_ids,
        rotary=rotary,
    )
    return handler(call), None


def _padding_mask(*, attention_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor | None:
    """The mask function registered with transformers: the padding mask alone; handlers are causal by themselves."""
    return attention_mask


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)

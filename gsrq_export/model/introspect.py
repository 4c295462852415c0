"""What a model's attention looks like, found out by running it, and proven by reproducing its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from gsrq_export.cache.frame import rotate
from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.model.intercept import AttentionCall, RotaryCall, intercept
from gsrq_export.model.streaming import device_of

PROBE_TOKENS = 24
LOGIT_TOLERANCE = 2e-3  # relative to the largest logit; float32 reordering stays far below


@dataclass(frozen=True)
class LayerSpec:
    """One layer that owns a cache. ``index`` counts such layers from 0, ``layer_idx`` is the model's own index."""

    index: int
    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    sliding_window: int
    rope_interleaved: bool
    rope_table: int  # index into ModelSpec.rope_tables


@dataclass(frozen=True)
class ModelSpec:
    """Everything the cache, the exporter and the kernels need to know of a model.

    Attributes:
        layers: the layers that own a cache, in the order in which they run.
        rope_tables: (cos, sin), float32 [max_length, rope_dim / 2] each, shared between layers.
        max_length: positions in the tables.
    """

    layers: tuple[LayerSpec, ...]
    rope_tables: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    max_length: int

    def layer(self, layer_idx: int) -> LayerSpec:
        """The layer with the model's own index."""
        return next(layer for layer in self.layers if layer.layer_idx == layer_idx)


class _RecordingCache(DynamicCache):  # type: ignore[misc]
    """Notes which layers write to the cache, and refuses state that is not keys and values."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.owners: list[int] = []

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.owners.append(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _recurrent(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "the model keeps recurrent state (linear attention or convolution) beside keys and values",
            "use a model whose layers are all attention",
        )

    update_conv_state = _recurrent
    update_recurrent_state = _recurrent


@torch.no_grad()
def inspect_model(model: torch.nn.Module, max_length: int) -> ModelSpec:
    """Find every layer that owns a cache and how it attends; prove it by reproducing the model's logits.

    Args:
        model: a transformers causal decoder in float32, in eval mode.
        max_length: positions for which rotary tables are made.
    Raises:
        UnsupportedModelError: the model's attention cannot be taken over faithfully. Nothing is changed.
        GsrqError: max_length is beyond what the model's rotary embedding supports.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder", "use a decoder-only model")
    _check_length(config, max_length)
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (1, PROBE_TOKENS), generator=generator).to(device_of(model))
    cache = _RecordingCache(config)
    expected = model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return _plain_attention(call)

    with _rotary_modules(model) as embeddings, intercept(model, record):
        logits = model(input_ids=ids, use_cache=False).logits
    seen = [call.layer_idx for call in calls]
    if sorted(seen) != sorted(cache.owners) or not seen:
        missed = sorted(set(cache.owners) - set(seen))
        shared = sorted(set(seen) - set(cache.owners))
        raise UnsupportedModelError(
            f"layers {missed} own a cache but did not pass through the attention interface"
            if missed
            else f"layers {shared} attend over a cache they do not own",
            "this architecture is not supported; nothing was written",
        )
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not error <= LOGIT_TOLERANCE:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its attention is not rotary attention as taken over here "
            f"(logits differ by {error:.2g}, allowed {LOGIT_TOLERANCE:g})",
            "this architecture is not supported; nothing was written",
        )
    return _spec(calls, embeddings, max_length)


def _check_length(config: Any, max_length: int) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    kinds = {p.get("rope_type") for p in [rope, *(v for v in rope.values() if isinstance(v, dict))]}
    if limit and max_length > limit:
        raise GsrqError(
            f"export.max_length {max_length} is over the model's {limit} positions",
            f"set it to {limit} or less",
        )
    original = rope.get("original_max_position_embeddings") or limit
    if "dynamic" in kinds and original and max_length > original:
        raise GsrqError(
            f"export.max_length {max_length}: dynamic RoPE scaling changes old positions past {original} tokens",
            f"set it to {original} or less, or choose a static scaling (linear, yarn, llama3)",
        )


def _plain_attention(call: AttentionCall) -> torch.Tensor:
    """Exact causal attention on the call's tensors, with the pairing found for its rotary function."""
    length = call.query.shape[2]
    cos, sin, interleaved = _table(call.rotary)
    query, key = (rotate(x, cos, sin, interleaved) for x in (call.query, call.key))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, call.value))
    score = query @ key.transpose(2, 3) * call.scale
    if call.softcap:
        score = call.softcap * torch.tanh(score / call.softcap)
    position = torch.arange(length, device=score.device)
    age = position[:, None] - position
    hidden = (age < 0) | ((age >= call.sliding_window) if call.sliding_window else age.new_zeros((), dtype=torch.bool))
    return (score.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def _table(rotary: RotaryCall) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(cos, sin) with one column a pair, and whether pairs interleave, by trying the function on random data."""
    length = rotary.cos.shape[-2]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, length, rotary.width, generator=generator).to(rotary.cos)
    cos, sin = rotary.cos[:1], rotary.sin[:1]
    expected = rotary.function(x, x, cos, sin)[0]
    for columns in (slice(0, cos.shape[-1] // 2), slice(0, None, 2), slice(None)):
        for interleaved in (False, True):
            c, s = cos[..., columns], sin[..., columns]
            if 2 * c.shape[-1] <= rotary.width and torch.allclose(rotate(x, c, s, interleaved), expected, atol=1e-5):
                return rotary.cos[..., columns], rotary.sin[..., columns], interleaved
    raise UnsupportedModelError(
        "the model's rotary embedding pairs elements neither by halves nor by neighbours",
        "this architecture is not supported; nothing was written",
    )


@dataclass
class _Embedding:
    """A call of a rotary embedding module, to be repeated for all positions."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cos: torch.Tensor

    def table(self, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        def swap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.is_floating_point():
                return value.float()  # the module takes dtype and device from it
            return torch.arange(max_length, device=value.device)[None]

        cos, sin = self.module(*map(swap, self.args), **{k: swap(v) for k, v in self.kwargs.items()})
        return cos, sin


@contextmanager
def _rotary_modules(model: torch.nn.Module) -> Iterator[list[_Embedding]]:
    calls: list[_Embedding] = []

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(_Embedding(module, args, kwargs, output[0]))

    handles = [
        m.register_forward_hook(hook, with_kwargs=True)
        for m in model.modules()
        if type(m).__name__.endswith("RotaryEmbedding")
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _spec(calls: list[AttentionCall], embeddings: list[_Embedding], max_length: int) -> ModelSpec:
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    used: list[int] = []  # id of the embedding call behind each table
    layers = []
    for index, call in enumerate(calls):
        source = next((e for e in embeddings if e.cos is call.rotary.cos or torch.equal(e.cos, call.rotary.cos)), None)
        if source is None:
            raise UnsupportedModelError(
                f"layer {call.layer_idx}: the module that makes its rotary embedding was not found",
                "this architecture is not supported; nothing was written",
            )
        probe_cos, _, interleaved = _table(call.rotary)
        if id(source) not in used:
            cos, sin = source.table(max_length)
            full = RotaryCall(call.rotary.function, cos, sin, call.rotary.width)
            cos, sin, _ = _table(full)
            _check_table(cos[0], probe_cos[0], call.layer_idx)
            tables.append((cos[0].float().contiguous(), sin[0].float().contiguous()))
            used.append(id(source))
        layers.append(
            LayerSpec(
                index=index,
                layer_idx=call.layer_idx,
                num_heads=call.query.shape[1],
                num_kv_heads=call.key.shape[1],
                head_dim=call.key.shape[3],
                scale=call.scale,
                softcap=call.softcap,
                sliding_window=call.sliding_window,
                rope_interleaved=interleaved,
                rope_table=used.index(id(source)),
            )
        )
    return ModelSpec(tuple(layers), tuple(tables), max_length)


def _check_table(table: torch.Tensor, probe: torch.Tensor, layer_idx: int) -> None:
    """Long-context scalings (longrope) may rightly differ from the short probe, so only shape and range are held."""
    if table.shape[-1] != probe.shape[-1] or not bool(torch.isfinite(table).all()):
        raise UnsupportedModelError(
            f"layer {layer_idx}: rotary table {list(table.shape)} does not fit the probe's {list(probe.shape)}",
            "this architecture is not supported; nothing was written",
        )

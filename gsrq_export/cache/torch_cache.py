"""The coded cache for transformers: ``with coded(model, codebooks): model.generate(...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention
from gsrq_export.cache.rule import CacheRule
from gsrq_export.codec.codebook import LayerCodebooks
from gsrq_export.errors import GsrqError
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import LayerSpec, ModelSpec, inspect_model


class GsrqLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's coded cache. It grows by blocks; rows may differ in length."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: LayerCache | None = None
        self.lengths: torch.Tensor | None = None  # int64 [B], real tokens
        self.columns = 0  # tokens appended, padding included

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hands the new tokens on; the attention handler appends them, since that is where padding is known."""
        self.is_initialized = True
        self.columns += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache, self.lengths, self.columns = None, None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise GsrqError(
                "a coded cache cannot be cropped: tokens that left the window are not kept exactly",
                "generate without an assistant model",
            )

    def _map(self, function: Any) -> None:
        if self.cache is not None and self.lengths is not None:
            self.cache = LayerCache(**{name: function(tensor) for name, tensor in vars(self.cache).items()})
            self.lengths = function(self.lengths)


class GsrqCache(Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values are coded; only useful within ``coded``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(layers=[GsrqLayer() for _ in range(1 + max(layer.layer_idx for layer in spec.layers))])

    def bytes(self) -> int:
        """Bytes really held by codes and exact buffers."""
        held = [layer.cache for layer in self.layers if layer.cache is not None]
        return sum(t.numel() * t.element_size() for cache in held for t in vars(cache).values())


class CodedAttention:
    """Attention handler that keeps each layer's keys and values in a coded cache.

    Args:
        spec: of the model, see ``inspect_model``.
        codebooks: one entry a layer of the spec.
        rule: sinks, window and block.
        beam: beam size of encoding.
        exact_prefill: tokens of the same call are seen exactly.
        exact_dtype: type in which exact tokens are held.
    """

    def __init__(
        self,
        spec: ModelSpec,
        codebooks: Sequence[LayerCodebooks],
        rule: CacheRule,
        beam: int = 1,
        exact_prefill: bool = False,
        exact_dtype: torch.dtype = torch.float16,
    ) -> None:
        _check(spec, codebooks)
        self.spec, self.codebooks, self.exact_dtype = spec, list(codebooks), exact_dtype
        self.config = AttentionConfig(scale=1.0, rule=rule, beam=beam, exact_prefill=exact_prefill)
        self.cache: GsrqCache | None = None  # of the forward pass under way; None: nothing is kept

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        spec = self.spec.layer(call.layer_idx)
        device = call.query.device
        codebooks = self.codebooks[spec.index] = self.codebooks[spec.index].to(device)
        layer = self.cache.layers[call.layer_idx] if self.cache is not None else GsrqLayer()
        batch, _, steps, _ = call.query.shape
        if layer.lengths is None:
            layer.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        real = torch.ones(batch, steps, dtype=torch.bool, device=device)
        if call.mask is not None:
            if call.mask.ndim != 2:
                raise GsrqError(
                    f"attention_mask has {call.mask.ndim} axes", "a coded cache takes the [batch, length] padding mask"
                )
            real = call.mask[:, -steps:].bool()
        new = real.sum(1)
        order = torch.argsort(~real, dim=1, stable=True)  # real tokens first, in order
        self._check_positions(call, real, layer.lengths, order)

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.gather(2, order[:, None, :, None].expand_as(x)).float()

        cache = self._grown(layer, spec, codebooks, batch, int((layer.lengths + new).max()), device)
        cos, sin = (table.to(device) for table in self.spec.rope_tables[spec.rope_table])
        config = replace(
            self.config,
            scale=spec.scale,
            softcap=spec.softcap,
            sliding_window=spec.sliding_window,
            rope_interleaved=spec.rope_interleaved,
        )
        query, key, value = move(call.query), move(call.key), move(call.value)
        output, layer.cache = gsrq_attention(
            query, key, value, cos, sin, layer.lengths, new, cache, codebooks.keys, codebooks.values, config
        )
        layer.lengths = layer.lengths + new
        back = order.argsort(1)[:, :, None, None].expand_as(output)
        return output.gather(1, back).to(call.query.dtype)

    def _grown(
        self,
        layer: GsrqLayer,
        spec: LayerSpec,
        codebooks: LayerCodebooks,
        batch: int,
        length: int,
        device: torch.device,
    ) -> LayerCache:
        """The layer's cache with room for the codes of ``length`` tokens."""
        rule, coded = self.config.rule, self.config.rule.coded(length)
        cache = layer.cache
        if cache is None:
            return LayerCache.empty(
                batch,
                coded,
                spec.num_kv_heads,
                spec.head_dim,
                codebooks.keys,
                codebooks.values,
                rule,
                self.exact_dtype,
                device,
            )
        more = coded - cache.key_codes.shape[1]
        if more <= 0:
            return cache
        pad = torch.nn.functional.pad
        return replace(
            cache, key_codes=pad(cache.key_codes, (0, 0, 0, more)), value_codes=pad(cache.value_codes, (0, 0, 0, more))
        )

    def _check_positions(
        self, call: AttentionCall, real: torch.Tensor, past: torch.Tensor, order: torch.Tensor
    ) -> None:
        """A token's position must be its index among the row's real tokens: that is what the cache stores."""
        if call.position_ids is None:
            return
        given = call.position_ids.expand(real.shape[0], -1).to(real.device)
        expected = past[:, None] + real.cumsum(1) - 1
        wrong = (given != expected) & real
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise GsrqError(
                f"position_ids[{row}, {column}] is {int(given[row, column])}, "
                f"but the row has {int(expected[row, column])} real tokens before it",
                "pass position_ids that count real tokens from 0, as model.generate does, and no packed sequences",
            )


def _check(spec: ModelSpec, codebooks: Sequence[LayerCodebooks]) -> None:
    if len(codebooks) != len(spec.layers):
        raise GsrqError(
            f"codebooks for {len(codebooks)} layers, but the model has {len(spec.layers)} layers with a cache",
            "use the codebooks that were calibrated for this model",
        )
    for layer, books in zip(spec.layers, codebooks, strict=True):
        width = layer.num_kv_heads * layer.head_dim
        for kind, book in (("keys", books.keys), ("values", books.values)):
            if book.groups * book.width != width:
                raise GsrqError(
                    f"layer {layer.layer_idx}: the codebook of {kind} codes {book.groups * book.width} elements, "
                    f"the layer's KV heads have {width}",
                    "use the codebooks that were calibrated for this model",
                )


@contextmanager
def coded(
    model: torch.nn.Module,
    codebooks: Sequence[LayerCodebooks],
    rule: CacheRule | None = None,
    *,
    beam: int = 1,
    exact_prefill: bool = False,
    exact_dtype: torch.dtype = torch.float16,
    spec: ModelSpec | None = None,
) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` runs on a coded cache, in ``generate`` and in plain calls alike.

    Args:
        model: a transformers causal decoder.
        codebooks: one entry for each layer that owns a cache, in order.
        rule: sinks, window and block; the default is 4, 64, 64.
        beam, exact_prefill, exact_dtype: see ``CodedAttention``.
        spec: of the model, if it is known already.
    Raises:
        UnsupportedModelError: the model's attention cannot be taken over.
        GsrqError: the codebooks are not of this model.
    """
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 8192)
    handler = CodedAttention(
        spec or inspect_model(model, limit), codebooks, rule or CacheRule(), beam, exact_prefill, exact_dtype
    )

    with attached(model, handler, GsrqCache):
        yield model


class CachingHandler(Protocol):
    """An attention handler that keeps keys and values in a cache of its own kind."""

    spec: ModelSpec
    cache: Any  # of the forward pass under way; None: nothing is kept

    def __call__(self, call: AttentionCall) -> torch.Tensor: ...


@contextmanager
def attached(model: torch.nn.Module, handler: CachingHandler, kind: Callable[[ModelSpec], Cache]) -> Iterator[None]:
    """Intercept ``model`` with a handler, and give it a cache of its kind wherever the model would make one.

    Args:
        kind: the cache's class.
    Raises (when the model runs):
        GsrqError: past_key_values of another kind that holds tokens.
    """

    def use_cache(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if isinstance(given, kind):  # type: ignore[arg-type]
            handler.cache = given
        elif given is not None and given.get_seq_length():
            raise GsrqError("past_key_values holds tokens that are not coded", "start with an empty cache")
        elif given is not None or wanted or (wanted is None and getattr(model.config, "use_cache", False)):
            handler.cache = kwargs["past_key_values"] = kind(handler.spec)
        else:
            handler.cache = None
        return args, kwargs

    hook = model.register_forward_pre_hook(use_cache, with_kwargs=True)
    try:
        with intercept(model, handler):
            yield
    finally:
        hook.remove()

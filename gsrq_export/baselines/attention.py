"""Attention over a cache that any codec quantizes, under the cache rule that GSRQ obeys. For evaluation.

``with baseline(model, codecs, rule): ...`` runs a transformers model on it, in ``generate`` and in plain calls alike.
Exact and reconstructed keys and values of all tokens lie side by side in memory: nothing is saved here, and
``effective_bits`` says what would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from gsrq_export.baselines.base import CacheCodec, LayerCodecs
from gsrq_export.cache.reference import QUERY_CHUNK, rotate
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import GsrqLayer, attached
from gsrq_export.errors import GsrqError
from gsrq_export.model.intercept import AttentionCall
from gsrq_export.model.introspect import LayerSpec, ModelSpec, inspect_model


@dataclass
class Tokens:
    """A layer's cache, float32 [B, num_kv_heads, tokens, head_dim] each.

    Attributes:
        raw: exact keys before RoPE, rounded to the exact buffers' type.
        keys, values: exact, keys after RoPE.
        coded_keys, coded_values: of tokens sinks .. sinks + coded - 1, as reconstructed; keys after RoPE.
    """

    raw: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    coded_keys: torch.Tensor
    coded_values: torch.Tensor


class BaselineLayer(GsrqLayer):
    """One layer's cache; all rows have one length."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tokens | None = None

    def reset(self) -> None:
        super().reset()
        self.tokens = None

    def _map(self, function: Any) -> None:
        if self.tokens is not None:
            self.tokens = Tokens(**{name: function(tensor) for name, tensor in vars(self.tokens).items()})


class BaselineCache(Cache):  # type: ignore[misc]
    """A transformers cache; only useful within ``baseline``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(layers=[BaselineLayer() for _ in range(1 + max(layer.layer_idx for layer in spec.layers))])


class BaselineAttention:
    """Attention handler: every query sees what a token-by-token decode would have shown it (docs/operator.md, 2 and 3).

    Args:
        spec: of the model, see ``inspect_model``.
        codecs: one entry a layer of the spec.
        rule: sinks, window and block, in tokens.
        exact_prefill: tokens of the same call are seen exactly.
        exact_dtype: to which keys (before RoPE) and values are rounded before anything else.
    """

    def __init__(
        self,
        spec: ModelSpec,
        codecs: Sequence[LayerCodecs],
        rule: CacheRule,
        exact_prefill: bool = False,
        exact_dtype: torch.dtype = torch.float16,
    ) -> None:
        if len(codecs) != len(spec.layers):
            raise GsrqError(
                f"codecs for {len(codecs)} layers, but the model has {len(spec.layers)} layers with a cache",
                "fit the method on this model",
            )
        for codec in (codec for pair in codecs for codec in (pair.keys, pair.values)):
            if rule.block % codec.group_tokens:
                raise GsrqError(
                    f"cache.block {rule.block} is not a multiple of the {codec.group_tokens} tokens coded together",
                    f"set the block to a multiple of {codec.group_tokens}",
                )
        self.spec, self.codecs, self.rule = spec, list(codecs), rule
        self.exact_prefill, self.exact_dtype = exact_prefill, exact_dtype
        self.cache: BaselineCache | None = None  # of the forward pass under way; None: nothing is kept

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        spec = self.spec.layer(call.layer_idx)
        layer = self.cache.layers[call.layer_idx] if self.cache is not None else BaselineLayer()
        past = layer.tokens.keys.shape[2] if layer.tokens is not None else 0
        _check(call, past, self.spec.max_length)
        layer.tokens = self._append(layer.tokens, call, spec)
        return self._attend(layer.tokens, call, spec, past).to(call.query.dtype)

    def _rotate(self, x: torch.Tensor, start: int, spec: LayerSpec) -> torch.Tensor:
        """[B, heads, n, head_dim] of tokens start .. start + n - 1."""
        rows = slice(start, start + x.shape[2])
        cos, sin = (table[rows].to(x.device)[None] for table in self.spec.rope_tables[spec.rope_table])
        return rotate(x, cos, sin, spec.rope_interleaved)

    def _append(self, tokens: Tokens | None, call: AttentionCall, spec: LayerSpec) -> Tokens:
        """The cache after the new tokens, blocks that left the window coded."""
        raw, values = (x.to(self.exact_dtype).float() for x in (call.key, call.value))
        if tokens is None:
            none = raw[:, :, :0]
            tokens = Tokens(none, none, none, none, none)
        past = tokens.keys.shape[2]
        keys = torch.cat([tokens.keys, self._rotate(raw, past, spec)], 2)
        raw, values = torch.cat([tokens.raw, raw], 2), torch.cat([tokens.values, values], 2)
        start, stop = (self.rule.sinks + self.rule.coded(n) for n in (past, keys.shape[2]))
        coded_keys, coded_values = tokens.coded_keys, tokens.coded_values
        if stop > start:
            codecs = self.codecs[spec.index]
            if codecs.keys.frame == "post-rope":
                new = _reconstruct(codecs.keys, keys[:, :, start:stop])
            else:
                new = self._rotate(_reconstruct(codecs.keys, raw[:, :, start:stop]), start, spec)
            coded_keys = torch.cat([coded_keys, new], 2)
            coded_values = torch.cat([coded_values, _reconstruct(codecs.values, values[:, :, start:stop])], 2)
        return Tokens(raw, keys, values, coded_keys, coded_values)

    def _attend(self, tokens: Tokens, call: AttentionCall, spec: LayerSpec, past: int) -> torch.Tensor:
        """[B, T, num_heads, head_dim] float32."""
        batch, heads, steps, head_dim = call.query.shape
        query = self._rotate(call.query.float(), past, spec)
        query = query.reshape(batch, spec.num_kv_heads, heads // spec.num_kv_heads, steps, head_dim)
        sinks = self.rule.sinks
        parts = []
        for begin in range(past, past + steps, QUERY_CHUNK):
            end = min(begin + QUERY_CHUNK, past + steps)
            here = torch.arange(begin, end, device=query.device)[:, None]
            seen = self.rule.coded(torch.full_like(here, past) + 1 if self.exact_prefill else here + 1)
            fewest, most = int(seen[0]), int(seen[-1])
            # Of the exact tokens only the sinks and those that some query of the chunk sees.
            early, late = slice(0, min(sinks, end)), slice(sinks + fewest, max(sinks + fewest, end))
            keys, values = (
                torch.cat([coded[:, :, :most], exact[:, :, early], exact[:, :, late]], 2)
                for coded, exact in ((tokens.coded_keys, tokens.keys), (tokens.coded_values, tokens.values))
            )
            position = torch.arange(end, device=query.device)
            token = torch.cat([sinks + torch.arange(most, device=query.device), position[early], position[late]])
            is_coded = torch.arange(len(token), device=query.device) < most
            visible = torch.where(is_coded, token < sinks + seen, (token < sinks) | (token >= sinks + seen))
            visible &= token <= here
            if spec.sliding_window:
                visible &= here - token < spec.sliding_window
            rows = query[:, :, :, begin - past : end - past]
            score = torch.einsum("bkgtd,bkld->bkgtl", rows, keys) * spec.scale
            if spec.softcap:
                score = spec.softcap * torch.tanh(score / spec.softcap)
            weight = score.masked_fill(~visible, float("-inf")).softmax(-1)
            parts.append(torch.einsum("bkgtl,bkld->btkgd", weight, values))
        return torch.cat(parts, 1).reshape(batch, steps, heads, head_dim)


def _reconstruct(codec: CacheCodec, x: torch.Tensor) -> torch.Tensor:
    """x: [B, num_kv_heads, n, head_dim]. Rows may follow each other: n is a multiple of the codec's groups."""
    batch, heads, count, dim = x.shape
    seen = codec.reconstruct(x.transpose(1, 2).reshape(batch * count, heads, dim))
    return seen.reshape(batch, count, heads, dim).transpose(1, 2)


def _check(call: AttentionCall, past: int, limit: int) -> None:
    steps = call.query.shape[2]
    if past + steps > limit:
        raise GsrqError(f"{past + steps} tokens exceed the rotary table's {limit} positions", "use a shorter input")
    if call.mask is not None and not bool(call.mask.bool().all()):
        raise GsrqError("attention_mask marks padding", "give sequences of one length to a baseline's cache")
    if call.position_ids is not None:
        expected = torch.arange(past, past + steps, device=call.position_ids.device)
        if not bool((call.position_ids == expected).all()):
            raise GsrqError(
                f"position_ids do not count from {past}", "pass none, or count the tokens of the sequence from 0"
            )


@contextmanager
def baseline(
    model: torch.nn.Module,
    codecs: Sequence[LayerCodecs],
    rule: CacheRule | None = None,
    *,
    exact_prefill: bool = False,
    exact_dtype: torch.dtype = torch.float16,
    spec: ModelSpec | None = None,
) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` runs on a cache that ``codecs`` quantize.

    Args:
        model: a transformers causal decoder.
        codecs: one entry for each layer that owns a cache, in order.
        rule: sinks, window and block; the default is 4, 64, 64.
        exact_prefill, exact_dtype: see ``BaselineAttention``.
        spec: of the model, if it is known already.
    Raises:
        UnsupportedModelError: the model's attention cannot be taken over.
        GsrqError: the codecs are not of this model or do not fit the rule.
    """
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 8192)
    known = spec or inspect_model(model, limit)
    handler = BaselineAttention(known, codecs, rule or CacheRule(), exact_prefill, exact_dtype)

    with attached(model, handler, BaselineCache):
        yield model

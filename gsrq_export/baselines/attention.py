"""Attention over a cache that any codec quantizes, under the cache rule that GSRQ obeys. For evaluation.

``with baseline(model, codecs, rule): ...`` runs a transformers model on it, in ``generate`` and in plain calls alike.
What attention sees lies in memory as float32: nothing is saved here, and ``effective_bits`` says what would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from gsrq_export.baselines.base import LayerCodecs
from gsrq_export.cache.frame import center_heads, rotate
from gsrq_export.cache.reference import QUERY_CHUNK
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import GsrqLayer, attached
from gsrq_export.errors import GsrqError
from gsrq_export.model.intercept import AttentionCall
from gsrq_export.model.introspect import LayerSpec, ModelSpec, inspect_model


@dataclass
class Tokens:
    """A layer's cache after ``count`` tokens, float32 [B, num_kv_heads, tokens, head_dim] each; keys after RoPE.

    Attributes:
        keys, values: what the next query sees: coded tokens as reconstructed, the others exact. Room for more than
            ``count`` tokens, so that a decoding step does not copy the cache.
        raw, exact_keys, exact_values: the newest tokens, those that are not coded yet, exact, rounded to the exact
            buffers' type; raw keys are before RoPE.
    """

    keys: torch.Tensor
    values: torch.Tensor
    raw: torch.Tensor
    exact_keys: torch.Tensor
    exact_values: torch.Tensor
    count: int = 0

    @property
    def first_exact(self) -> int:
        """The token that ``raw`` begins with."""
        return self.count - self.raw.shape[2]


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
            held = {name: function(value) for name, value in vars(self.tokens).items() if name != "count"}
            self.tokens = Tokens(**held, count=self.tokens.count)


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
        prefill_once: exact_prefill is meant for a sequence's first call; the tokens of a later call see what decoding
            them one by one would show, so that a continuation can be scored in one call.
    """

    def __init__(
        self,
        spec: ModelSpec,
        codecs: Sequence[LayerCodecs],
        rule: CacheRule,
        exact_prefill: bool = False,
        exact_dtype: torch.dtype = torch.float16,
        prefill_once: bool = False,
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
        self.exact_prefill, self.exact_dtype, self.prefill_once = exact_prefill, exact_dtype, prefill_once
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}
        self.cache: BaselineCache | None = None  # of the forward pass under way; None: nothing is kept

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        spec = self.spec.layer(call.layer_idx)
        layer = self.cache.layers[call.layer_idx] if self.cache is not None else BaselineLayer()
        past = layer.tokens.count if layer.tokens is not None else 0
        _check(call, past, self.spec.max_length)
        raw, values = (x.to(self.exact_dtype).float() for x in (call.key, call.value))
        keys = self._rotate(raw, past, spec)
        if layer.tokens is None:
            none = raw[:, :, :0]
            layer.tokens = Tokens(none, none, none, none, none)
        before = layer.tokens
        raw = torch.cat([before.raw, raw], 2)
        keys, values = torch.cat([before.exact_keys, keys], 2), torch.cat([before.exact_values, values], 2)
        now = Tokens(before.keys, before.values, raw, keys, values, past + call.key.shape[2])
        self._update(now, past, spec)
        output = self._attend(now, call, spec, past).to(call.query.dtype)
        # Sinks and coded tokens will not be asked for again.
        drop = min(now.count, self.rule.sinks + self.rule.coded(now.count)) - now.first_exact
        now.raw, now.exact_keys, now.exact_values = (x[:, :, drop:].clone() for x in (raw, keys, values))
        layer.tokens = now
        return output

    def _rotate(self, x: torch.Tensor, start: int, spec: LayerSpec) -> torch.Tensor:
        """[B, heads, n, head_dim] of tokens start .. start + n - 1."""
        place = (spec.rope_table, x.device)
        if place not in self._tables:
            self._tables[place] = tuple(table.to(x.device)[None] for table in self.spec.rope_tables[spec.rope_table])
        cos, sin = (table[:, start : start + x.shape[2]] for table in self._tables[place])
        return rotate(x, cos, sin, spec.rope_interleaved)

    def _update(self, tokens: Tokens, past: int, spec: LayerSpec) -> None:
        """Puts the new tokens, and blocks that left the window as coded, where later queries see them."""
        first, count = tokens.first_exact, tokens.count
        tokens.keys, tokens.values = (_room(x, past, count) for x in (tokens.keys, tokens.values))
        tokens.keys[:, :, past:count] = tokens.exact_keys[:, :, past - first :]
        tokens.values[:, :, past:count] = tokens.exact_values[:, :, past - first :]
        start, stop = (self.rule.sinks + self.rule.coded(n) for n in (past, count))
        if stop > start:
            codecs, rows = self.codecs[spec.index], slice(start - first, stop - first)
            if codecs.keys.frame == "post-rope":
                exact = tokens.exact_keys[:, :, rows]
                if codecs.keys.center is None:
                    keys = codecs.keys.reconstruct_heads(exact)
                else:
                    turned = self._rotate(center_heads(codecs.keys.center, exact).expand_as(exact), start, spec)
                    keys = codecs.keys.reconstruct_heads(exact - turned) + turned
            else:
                keys = self._rotate(codecs.keys.reconstruct_heads(tokens.raw[:, :, rows]), start, spec)
            tokens.keys[:, :, start:stop] = keys
            tokens.values[:, :, start:stop] = codecs.values.reconstruct_heads(tokens.exact_values[:, :, rows])

    def _attend(self, tokens: Tokens, call: AttentionCall, spec: LayerSpec, past: int) -> torch.Tensor:
        """[B, T, num_heads, head_dim] float32."""
        batch, heads, steps, head_dim = call.query.shape
        group = heads // spec.num_kv_heads
        query = self._rotate(call.query.float(), past, spec)
        query = query.reshape(batch, spec.num_kv_heads, group, steps, head_dim)
        frozen = self.exact_prefill and not (self.prefill_once and past)
        parts = []
        for begin in range(past, past + steps, QUERY_CHUNK):
            end = min(begin + QUERY_CHUNK, past + steps)
            here = torch.arange(begin, end, device=query.device)[:, None]
            coded = self.rule.coded(torch.full_like(here, past) + 1 if frozen else here + 1)
            fewest, most = (self.rule.coded((past if frozen else p) + 1) for p in (begin, end - 1))
            keys, values, early = tokens.keys[:, :, :end], tokens.values[:, :, :end], end
            token = torch.arange(end, device=query.device)
            mixed = not fewest == most == self.rule.coded(tokens.count)
            if mixed:  # tokens that are coded for some queries and exact for others stand there twice
                early = min(end, self.rule.sinks + most)
                tail = slice(self.rule.sinks + fewest, max(self.rule.sinks + fewest, end))
                token = torch.cat([token[:early], token[tail]])
                late = slice(tail.start - tokens.first_exact, tail.stop - tokens.first_exact)
                keys = torch.cat([keys[:, :, :early], tokens.exact_keys[:, :, late]], 2)
                values = torch.cat([values[:, :, :early], tokens.exact_values[:, :, late]], 2)
            visible = token <= here
            if mixed:
                is_early = torch.arange(len(token), device=query.device) < early
                visible &= is_early == (token < self.rule.sinks + coded)
            if spec.sliding_window:
                visible &= here - token < spec.sliding_window
            rows = query[:, :, :, begin - past : end - past].flatten(2, 3)
            seen = _weighted(rows, keys, values, visible.repeat(group, 1), spec)
            parts.append(seen.reshape(batch, spec.num_kv_heads, group, end - begin, head_dim))
        return torch.cat(parts, 3).permute(0, 3, 1, 2, 4).reshape(batch, steps, heads, head_dim)


def _weighted(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, spec: LayerSpec
) -> torch.Tensor:
    """Attention of query [B, KV, N, head_dim] over keys [B, KV, L, head_dim]; visible: bool [N, L]."""
    if not spec.softcap:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=spec.scale
        )
    score = spec.softcap * torch.tanh(query @ keys.transpose(2, 3) * (spec.scale / spec.softcap))
    weight = score.masked_fill(~visible, float("-inf")).softmax(-1)
    return weight @ values


def _room(x: torch.Tensor, held: int, count: int) -> torch.Tensor:
    """A buffer with the first ``held`` tokens of x and space for ``count``; twice that where it must grow."""
    if x.shape[2] >= count:
        return x
    grown = x.new_zeros(*x.shape[:2], count if not held else 2 * count, x.shape[3])
    grown[:, :, :held] = x[:, :, :held]
    return grown


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
    prefill_once: bool = False,
    spec: ModelSpec | None = None,
) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` runs on a cache that ``codecs`` quantize.

    Args:
        model: a transformers causal decoder.
        codecs: one entry for each layer that owns a cache, in order.
        rule: sinks, window and block; the default is 4, 64, 64.
        exact_prefill, exact_dtype, prefill_once: see ``BaselineAttention``.
        spec: of the model, if it is known already.
    Raises:
        UnsupportedModelError: the model's attention cannot be taken over.
        GsrqError: the codecs are not of this model or do not fit the rule.
    """
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 8192)
    known = spec or inspect_model(model, limit)
    handler = BaselineAttention(known, codecs, rule or CacheRule(), exact_prefill, exact_dtype, prefill_once)

    with attached(model, handler, BaselineCache):
        yield model

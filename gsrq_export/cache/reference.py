"""The operator ai.gsrq::GsrqAttention in plain torch: the oracle for the ONNX function and every kernel.

docs/operator.md has the signature in full. Written for reading; memory and time are O(T * n).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gsrq_export.cache.frame import from_frame, rotate, to_frame
from gsrq_export.cache.rule import CODE_TILE, CODEBOOK_SIZE, CacheRule, from_token_order, to_token_order
from gsrq_export.codec.codebook import Codebook
from gsrq_export.errors import GsrqError

QUERY_CHUNK = 512  # rows of the score matrix formed at once; bounds memory, changes nothing else


@dataclass(frozen=True)
class AttentionConfig:
    """The operator's attributes.

    Raises:
        GsrqError: a beam that no implementation takes.
    """

    scale: float
    rule: CacheRule = field(default_factory=CacheRule)
    beam: int = 1
    rope_interleaved: bool = False
    exact_prefill: bool = False
    softcap: float = 0.0  # 0: none
    sliding_window: int = 0  # 0: none
    codes_by_head: bool = False  # how stored codes are ordered, see cache/rule.py

    def __post_init__(self) -> None:
        if self.codes_by_head and self.rule.block % CODE_TILE:
            raise GsrqError(
                f"block = {self.rule.block}: codes ordered by head lie in tiles of {CODE_TILE} tokens",
                f"use a multiple of {CODE_TILE}, or codes ordered by token",
            )
        if not 1 <= self.beam <= CODEBOOK_SIZE:
            raise GsrqError(f"beam = {self.beam}: out of range", f"use 1 to {CODEBOOK_SIZE}")


def attributes(config: AttentionConfig, rotated_keys: bool = False) -> dict[str, int | float]:
    """The attributes of an operator node; what is unlike the first operator libraries, by an attribute of its own."""
    return {
        "scale": float(config.scale),
        "sinks": config.rule.sinks,
        "window": config.rule.window,
        "block": config.rule.block,
        "beam": config.beam,
        "rope_interleaved": int(config.rope_interleaved),
        "exact_prefill": int(config.exact_prefill),
        "softcap": float(config.softcap),
        "sliding_window": config.sliding_window,
        **({"key_frame": 1} if rotated_keys else {}),
        **({"code_order": 1} if config.codes_by_head else {}),
    }


@dataclass
class LayerCache:
    """A layer's cache tensors.

    Attributes:
        key_codes: int8 [B, capacity, code bytes of keys]; row c is token sinks + c. Ordered as the operator's
            config says; by head, capacity is a multiple of CODE_TILE.
        value_codes: int8 [B, capacity, code bytes of values].
        key_exact: float16, bfloat16 or float32 [B, KV heads, exact_slots, head_dim], before RoPE.
        value_exact: the same for values.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_exact: torch.Tensor
    value_exact: torch.Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        keys: Codebook,
        values: Codebook,
        rule: CacheRule,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
    ) -> LayerCache:
        exact = (batch, kv_heads, rule.exact_slots, head_dim)
        return cls(
            torch.zeros(batch, capacity, keys.code_bytes, dtype=torch.int8, device=device),
            torch.zeros(batch, capacity, values.code_bytes, dtype=torch.int8, device=device),
            torch.zeros(exact, dtype=dtype, device=device),
            torch.zeros(exact, dtype=dtype, device=device),
        )


def gsrq_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    past_lengths: torch.Tensor,
    new_lengths: torch.Tensor,
    cache: LayerCache,
    keys: Codebook,
    values: Codebook,
    config: AttentionConfig,
) -> tuple[torch.Tensor, LayerCache]:
    """Append new tokens to a coded cache and attend over it.

    Args:
        query: float32 [B, heads, T, head_dim], before RoPE; row b has new_lengths[b] tokens, then padding. Of float64,
            all but decoding, which is defined in float32, is computed in float64.
        key, value: float32 [B, KV heads, T, head_dim], key before RoPE.
        cos, sin: float32 [max positions, rope_dim / 2].
        past_lengths, new_lengths: int64 [B].
        cache: the tensors before; not changed.
        keys, values: the codebooks; keys with a center are coded in the rotated frame, see cache/frame.py.
    Returns:
        (output of the query's type [B, T, heads, head_dim], zero in the padding; the cache after).
    Raises:
        ValueError: a length exceeds the capacity or the rotary table; a capacity that no tiles fill.
    """
    rule = config.rule
    batch, heads, steps, head_dim = query.shape
    kv_heads = key.shape[1]
    if config.codes_by_head and cache.key_codes.shape[1] % CODE_TILE:
        raise ValueError(f"a capacity of {cache.key_codes.shape[1]} is no multiple of {CODE_TILE}: codes lie by head")
    runs = [book.code_run(head_dim, config.codes_by_head) for book in (keys, values)]
    stored = [to_token_order(c, run) for c, run in zip((cache.key_codes, cache.value_codes), runs, strict=True)]
    total = past_lengths + new_lengths
    coded_after = rule.coded(total)
    most = int(coded_after.max()) if batch else 0
    if most > cache.key_codes.shape[1]:
        raise ValueError(f"{most} coded tokens exceed the cache's capacity of {cache.key_codes.shape[1]}")
    if batch and int(total.max()) > cos.shape[0]:
        raise ValueError(f"{int(total.max())} tokens exceed the rotary table's {cos.shape[0]} positions")

    # What the cache stores is what attention sees: new tokens are rounded to its precision first.
    key = key.to(cache.key_exact.dtype)
    value = value.to(cache.value_exact.dtype)
    offset = torch.arange(steps, device=query.device)
    position = past_lengths[:, None] + offset  # [B, T]

    exact_keys = torch.cat([cache.key_exact, key], 2)  # [B, KV, E + T, head_dim]
    exact_values = torch.cat([cache.value_exact, value], 2)
    new_token = torch.where(offset < new_lengths[:, None], position, -1)
    exact_token = torch.cat([rule.slot_tokens(past_lengths), new_token], 1)  # [B, E + T], -1: nothing there

    key_codes = _code_blocks(stored[0], exact_keys, keys, past_lengths, total, config, cos, sin)
    value_codes = _code_blocks(stored[1], exact_values, values, past_lengths, total, config, cos, sin)
    after = LayerCache(
        from_token_order(key_codes, runs[0]),
        from_token_order(value_codes, runs[1]),
        _write_ring(exact_keys, past_lengths, total, rule),
        _write_ring(exact_values, past_lengths, total, rule),
    )

    coded_keys = _split_heads(keys.decode(key_codes[:, :most]), kv_heads).to(query.dtype)  # [B, KV, most, head_dim]
    coded_values = _split_heads(values.decode(value_codes[:, :most]), kv_heads).to(query.dtype)
    coded_token = (rule.sinks + torch.arange(most, device=query.device)).expand(batch, -1)

    token = torch.cat([coded_token, exact_token], 1)  # [B, L]
    is_coded = torch.arange(token.shape[1], device=query.device) < most
    table = token.clamp(min=0)
    if keys.center is None:
        joined = torch.cat([coded_keys, exact_keys.to(query.dtype)], 2)
        all_keys = rotate(joined, cos[table], sin[table], config.rope_interleaved)
    else:
        old, new = table[:, :most], table[:, most:]
        turned = rotate(exact_keys.to(query.dtype), cos[new], sin[new], config.rope_interleaved)
        coded_keys = from_frame(coded_keys, keys.center, cos[old], sin[old], config.rope_interleaved)
        all_keys = torch.cat([coded_keys, turned], 2)
    all_values = torch.cat([coded_values, exact_values.to(query.dtype)], 2)

    safe = position.clamp(max=cos.shape[0] - 1)
    rotated = rotate(query, cos[safe], sin[safe], config.rope_interleaved)
    rotated = rotated.reshape(batch, kv_heads, heads // kv_heads, steps, head_dim)
    # The number of coded tokens that each query sees.
    seen = rule.coded(past_lengths[:, None] + 1).expand(-1, steps) if config.exact_prefill else rule.coded(position + 1)
    seen = torch.minimum(seen, coded_after[:, None])

    parts = []
    for start in range(0, steps, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        here, first_exact = position[:, rows, None], rule.sinks + seen[:, rows, None]
        now = token[:, None]
        visible = torch.where(is_coded, now < first_exact, (now < rule.sinks) | (now >= first_exact))
        visible &= (now >= 0) & (now <= here)
        if config.sliding_window:
            visible &= here - now < config.sliding_window
        score = torch.einsum("bkgtd,bkld->bkgtl", rotated[:, :, :, rows], all_keys) * config.scale
        if config.softcap:
            score = config.softcap * torch.tanh(score / config.softcap)
        score = score.masked_fill(~visible[:, None, None], float("-inf"))
        weight = torch.nan_to_num(score.softmax(-1))  # padding rows may see nothing
        parts.append(torch.einsum("bkgtl,bkld->btkgd", weight, all_values))
    output = torch.cat(parts, 1).reshape(batch, steps, heads, head_dim)
    return output * (offset < new_lengths[:, None])[:, :, None, None], after


def _split_heads(vectors: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, L, KV * head_dim] -> [B, KV, L, head_dim]."""
    batch, length, width = vectors.shape
    return vectors.reshape(batch, length, kv_heads, width // kv_heads).transpose(1, 2)


def _source(token: torch.Tensor, past: torch.Tensor, rule: CacheRule) -> torch.Tensor:
    """Index of a token in the concatenation of the exact buffer and the new tokens. token: [B, L]."""
    past = past[:, None]
    return torch.where(token < past, rule.slot(token), rule.exact_slots + token - past)


def _code_blocks(
    codes: torch.Tensor,
    exact: torch.Tensor,
    codebook: Codebook,
    past: torch.Tensor,
    total: torch.Tensor,
    config: AttentionConfig,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Code the blocks that leave the window between ``past`` and ``total`` tokens; ``codes`` in token order."""
    before, after = config.rule.coded(past), config.rule.coded(total)
    codes = codes.clone()
    for b in range(codes.shape[0]):
        start, stop = int(before[b]), int(after[b])
        if stop > start:
            token = config.rule.sinks + torch.arange(start, stop, device=codes.device)[None]
            rows = exact[b][:, _source(token, past[b : b + 1], config.rule)[0]]  # [KV, L, head_dim]
            if codebook.center is not None:
                rows = to_frame(rows[None], codebook.center, cos[token], sin[token], config.rope_interleaved)[0]
            codes[b, start:stop] = codebook.encode(rows.transpose(0, 1).flatten(1), config.beam)
    return codes


def _write_ring(exact: torch.Tensor, past: torch.Tensor, total: torch.Tensor, rule: CacheRule) -> torch.Tensor:
    """The exact buffer after the new tokens are appended; slots that get none keep their content."""
    slot = torch.arange(rule.exact_slots, device=past.device)
    token = rule.slot_tokens(total)  # [B, E]
    source = torch.where(token >= past[:, None], rule.exact_slots + token - past[:, None], slot)
    index = source[:, None, :, None].expand(-1, exact.shape[1], -1, exact.shape[3])
    return exact.gather(2, index)

"""One matrix of cases for every implementation of the operator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention
from gsrq_export.cache.rule import CacheRule, to_token_order
from gsrq_export.codec.codebook import Codebook


def random_codebook(total: int, width: int, stages: int, seed: int = 0, transform: bool = False) -> Codebook:
    """Random codewords that shrink over the stages, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    groups = total // width
    shrink = 0.8 ** torch.arange(stages)[None, :, None, None]
    words = torch.randn(groups, stages, 256, width, generator=generator) * shrink
    metric = torch.eye(width).expand(groups, width, width).clone()
    if transform:
        metric += 0.2 * torch.randn(groups, width, width, generator=generator)
    return Codebook(words.half(), metric)


@dataclass
class Data:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    lengths: torch.Tensor


def continued(
    case: Case, data: Data, row: int, past: int, new: int, cache: LayerCache
) -> tuple[torch.Tensor, LayerCache]:
    """The reference over tokens past .. past + new - 1 of one row alone, and its cache after them."""
    part = slice(past, past + new)
    query, key, value = (x[row : row + 1, :, part] for x in (data.query, data.key, data.value))
    lengths = torch.tensor([past]), torch.tensor([new])
    return gsrq_attention(query, key, value, data.cos, data.sin, *lengths, cache, case.keys, case.values, case.config)


@dataclass(frozen=True)
class Case:
    name: str
    config: AttentionConfig
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    steps: int = 37
    lengths: tuple[int, ...] = (37, 0, 21)
    rope_dim: int = 16
    key_width: int = 16
    key_stages: int = 3
    value_width: int = 32
    value_stages: int = 2
    exact_dtype: torch.dtype = torch.float16
    transform: bool = False
    rotated: bool = False  # keys coded after RoPE
    keys: Codebook = field(init=False, compare=False)
    values: Codebook = field(init=False, compare=False)

    def __post_init__(self) -> None:
        total = self.kv_heads * self.head_dim
        set_ = object.__setattr__
        set_(self, "keys", random_codebook(total, self.key_width, self.key_stages, 1, self.transform))
        if self.rotated:
            center = torch.randn(total, generator=torch.Generator().manual_seed(3))
            set_(self, "keys", replace(self.keys, center=center))
        set_(self, "values", random_codebook(total, self.value_width, self.value_stages, 2, self.transform))

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def data(self, seed: int = 0) -> Data:
        generator = torch.Generator().manual_seed(seed)

        def randn(heads: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, self.steps, self.head_dim, generator=generator)

        angle = torch.arange(self.steps + 3)[:, None] * torch.logspace(0, -2, self.rope_dim // 2)
        return Data(
            randn(self.heads),
            randn(self.kv_heads),
            randn(self.kv_heads),
            angle.cos(),
            angle.sin(),
            torch.tensor(self.lengths),
        )

    def in_token_order(self, cache: LayerCache) -> LayerCache:
        """The cache as one of the case with codes ordered by token."""
        codes = [
            to_token_order(stored, book.code_run(self.head_dim, self.config.codes_by_head))
            for book, stored in ((self.keys, cache.key_codes), (self.values, cache.value_codes))
        ]
        return LayerCache(*codes, cache.key_exact, cache.value_exact)

    def empty(self) -> LayerCache:
        capacity = self.config.rule.coded(self.steps) + self.config.rule.block
        return LayerCache.empty(
            self.batch,
            capacity,
            self.kv_heads,
            self.head_dim,
            self.keys,
            self.values,
            self.config.rule,
            self.exact_dtype,
        )

    def run(self, data: Data, cache: LayerCache | None = None) -> tuple[torch.Tensor, LayerCache]:
        """The reference on the whole of the data, from an empty cache."""
        return gsrq_attention(
            data.query,
            data.key,
            data.value,
            data.cos,
            data.sin,
            torch.zeros(self.batch, dtype=torch.int64),
            data.lengths,
            cache or self.empty(),
            self.keys,
            self.values,
            self.config,
        )


SMALL = CacheRule(2, 5, 4)
CASES = [
    Case("plain", AttentionConfig(0.25, SMALL)),
    Case("joint heads, beam", AttentionConfig(0.25, SMALL, beam=3), key_width=32, value_width=8),
    Case("no window, no sinks", AttentionConfig(0.3, CacheRule(0, 0, 3)), exact_dtype=torch.float32),
    Case("interleaved, partial", AttentionConfig(0.3, CacheRule(1, 3, 5), rope_interleaved=True), rope_dim=8),
    Case("softcap, sliding", AttentionConfig(1.0, SMALL, softcap=2.0, sliding_window=9), transform=True),
    Case("exact prefill", AttentionConfig(0.25, SMALL, exact_prefill=True)),
    Case("one head, odd", AttentionConfig(0.2, CacheRule(3, 1, 2)), heads=3, kv_heads=1, head_dim=6, rope_dim=6,
         key_width=6, value_width=3, steps=23, lengths=(23,), exact_dtype=torch.bfloat16),
]  # fmt: skip
ROTATED = [
    Case("rotated", AttentionConfig(0.25, SMALL), rotated=True),
    Case("rotated, joint heads, beam", AttentionConfig(0.25, SMALL, beam=3), key_width=32, value_width=8, rotated=True),
    Case("rotated, interleaved, partial", AttentionConfig(0.3, CacheRule(1, 3, 5), rope_interleaved=True), rope_dim=8,
         rotated=True),
    Case("rotated, partial, softcap, sliding", AttentionConfig(1.0, SMALL, softcap=2.0, sliding_window=9), rope_dim=12,
         key_width=8, transform=True, rotated=True),
    Case("rotated, exact prefill", AttentionConfig(0.25, SMALL, exact_prefill=True), rotated=True),
    Case("rotated, one head, odd", AttentionConfig(0.2, CacheRule(3, 1, 2)), heads=3, kv_heads=1, head_dim=6,
         rope_dim=6, key_width=6, value_width=3, steps=23, lengths=(23,), exact_dtype=torch.bfloat16, rotated=True),
]  # fmt: skip
TILED = CacheRule(2, 5, 8)
BY_HEAD = [
    Case("by head, several sub-vectors a head", AttentionConfig(0.25, TILED, codes_by_head=True), key_width=4,
         value_width=8),
    Case("by head, sub-vectors of several heads", AttentionConfig(0.25, TILED, beam=2, codes_by_head=True), heads=8,
         kv_heads=8, key_width=32, value_width=128),
    Case("by head, rotated, sliding, one a head", AttentionConfig(1.0, CacheRule(0, 3, 16), sliding_window=19,
         codes_by_head=True), kv_heads=4, steps=43, lengths=(43, 27), value_width=16, rotated=True),
    Case("by head, one head, odd", AttentionConfig(0.2, TILED, exact_prefill=True, codes_by_head=True), heads=3,
         kv_heads=1, head_dim=6, rope_dim=6, key_width=6, value_width=3, steps=23, lengths=(23,)),
]  # fmt: skip

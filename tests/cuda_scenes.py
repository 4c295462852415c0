"""Random situations of the operator: a layer, a cache that holds something already, new tokens. On any device.

What no implementation may read or write is filled so that it shows: unwritten slots, padding and code rows past the
coded ones hold large numbers; all cache tensors lie between guard bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from attention_cases import random_codebook

from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention
from gsrq_export.cache.rule import CODE_TILE, CacheRule, from_token_order
from gsrq_export.codec.codebook import Codebook
from gsrq_export.cuda import CallTensors, CudaLayer

GUARD = 512  # bytes before and after a cache tensor
STRAY = 60.0  # in what must not be read; finite, as the operator demands
SPREAD = 6  # powers of two between the stages of a codebook on an int8 grid


def grid_codebook(total: int, width: int, stages: int, seed: int, transform: bool = False) -> Codebook:
    """Codewords that are an int8 times a power of two of their stage."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-127, 128, (total // width, stages, 256, width), generator=generator).float()
    exponents = -6 - (torch.arange(stages) // 3).clamp(max=SPREAD)
    other = random_codebook(width, width, 1, seed, transform)
    scaled = words * 2.0 ** exponents[None, :, None, None]
    return Codebook(scaled.half(), other.transform.expand(total // width, width, width).contiguous())


@dataclass(frozen=True)
class Scene:
    """past, new: tokens a row in the cache and to come; page: 0 for a linear cache."""

    past: tuple[int, ...]
    new: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    half_rope: int = 32
    rope: str = "geometric"  # or scaled, random, float32: angles as models compute them, off by 1e-3 at 20000
    keys: tuple[int, int] = (64, 4)  # width, stages
    values: tuple[int, int] = (64, 4)
    grid: bool = True
    transform: bool = False
    config: AttentionConfig = field(default_factory=lambda: AttentionConfig(0.125, CacheRule(4, 16, 8)))
    dtype: torch.dtype = torch.float16
    exact_dtype: torch.dtype = torch.float16
    page: int = 0
    seed: int = 0
    spare: int = 0  # positions and coded rows beyond what the call needs
    rotated: bool = False  # the keys' frame

    def __str__(self) -> str:
        c, r = self.config, self.config.rule
        traits = [
            name
            for name in ("exact_prefill", "rope_interleaved", "softcap", "sliding_window", "codes_by_head")
            if getattr(c, name)
        ]
        types = f"{self.dtype}/{self.exact_dtype}".replace("torch.", "")
        return (
            f"past{self.past}new{self.new} {self.heads}/{self.kv_heads}x{self.head_dim} "
            f"rope {self.half_rope} {self.rope} "
            f"k{self.keys} v{self.values} {'grid' if self.grid else 'float'}{' A' if self.transform else ''}"
            f"{' rotated' if self.rotated else ''} {types} "
            f"S{r.sinks} W{r.window} P{r.block} page {self.page} beam {c.beam} {' '.join(traits)}"
        )

    @property
    def total(self) -> int:
        """The most tokens that a row has in the end."""
        return max(p + n for p, n in zip(self.past, self.new, strict=True)) + self.spare


def random_scene(seed: int) -> Scene:
    """Odd shapes of everything; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    head_dim = int(str(pick(64, 96, 128, 256, 128, 64, 32, 80)))
    kv_heads = 1 if head_dim == 256 else int(str(pick(1, 2, 4)))
    fractions = [f for f in (0.5, 1, 1, 2, 4) if (kv_heads / f) == int(kv_heads / f) or f < 1]
    key_width, value_width = (int(head_dim * float(str(pick(*fractions)))) for _ in range(2))
    rule = CacheRule(int(str(pick(0, 1, 4, 5))), int(str(pick(0, 3, 16, 31))), int(str(pick(1, 7, 8, 16))))
    batch, decode = between(1, 5), bool(between(0, 1))
    past = tuple(int(str(pick(0, between(0, 40), between(0, 700)))) for _ in range(batch))
    new = tuple(between(0, 1) if decode else between(0, 130) for _ in range(batch))
    new = (max(new[0], 1), *new[1:])
    config = AttentionConfig(
        scale=head_dim**-0.5,
        rule=rule,
        beam=int(str(pick(1, 1, 1, 3))),
        rope_interleaved=bool(between(0, 3) == 0),
        exact_prefill=bool(between(0, 1)),
        softcap=float(str(pick(0, 0, 0, 5.0))),
        sliding_window=int(str(pick(0, 0, 0, 50))),
    )
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    scene = Scene(
        past,
        new,
        kv_heads * between(1, 16),
        kv_heads,
        head_dim,
        int(str(pick(head_dim // 2, head_dim // 2, head_dim // 4, 0))),
        str(pick("geometric", "geometric", "scaled", "random")),
        (key_width, between(1, 33)),
        (value_width, between(1, 33)),
        bool(between(0, 1)),
        bool(between(0, 3) == 0),
        config,
        types[str(pick("f32", "f16", "bf16"))],
        types[str(pick("f16", "f16", "bf16", "f32"))],
        int(str(pick(0, 1, 3))) * rule.block,
        seed=seed,
        spare=between(0, 40),
        rotated=bool(between(0, 1)),
    )
    return with_config(scene, codes_by_head=rule.block % CODE_TILE == 0 and between(0, 2) > 0)


def guarded(content: torch.Tensor) -> torch.Tensor:
    """A copy between GUARD bytes of 0x5a on either side; intact() checks them."""
    size = content.numel() * content.element_size()
    memory = torch.full((size + 2 * GUARD,), 0x5A, dtype=torch.uint8, device=content.device)
    inner = memory[GUARD : GUARD + size].view(content.dtype).view(content.shape)
    return inner.copy_(content)


def intact(tensor: torch.Tensor) -> bool:
    storage = torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return bool((storage[:GUARD] == 0x5A).all() and (storage[-GUARD:] == 0x5A).all())


class Stage:
    """A scene set up on a device: the layer, the state, and the reference's answers."""

    def __init__(self, scene: Scene, device: torch.device | str) -> None:
        self.scene, self.device = scene, torch.device(device)
        total, book = scene.kv_heads * scene.head_dim, grid_codebook if scene.grid else random_codebook
        self.keys = book(total, *scene.keys, 1 + scene.seed, scene.transform).to(device)
        self.values = book(total, *scene.values, 2 + scene.seed, scene.transform).to(device)
        self.generator = torch.Generator(self.device).manual_seed(scene.seed)
        if scene.rotated:
            self.keys = replace(self.keys, center=self.randn(total))
        precision = torch.float32 if scene.rope == "float32" else torch.float64
        frequency = torch.logspace(0, -4, scene.half_rope, dtype=precision, device=device)
        angle = torch.arange(scene.total, device=device)[:, None] * frequency
        if scene.rope == "random":
            angle = 6.3 * torch.rand(angle.shape, generator=self.generator, device=device)
        factor = 1.2 if scene.rope == "scaled" else 1.0
        self.cos, self.sin = (angle.cos() * factor).float(), (angle.sin() * factor).float()
        self.layer = CudaLayer(
            scene.heads, scene.head_dim, self.keys, self.values, self.cos, self.sin, scene.config, device
        )
        self.past = torch.tensor(scene.past, device=device)
        self.new = torch.tensor(scene.new, device=device)
        self.cache = self._state()
        self.tokens = self.draw(max(scene.new))

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def draw(self, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query, key and value of new tokens; STRAY in the padding."""
        scene, batch = self.scene, len(self.scene.past)
        padding = (torch.arange(steps, device=self.device) >= self.new[:, None])[:, None, :, None]
        query, key, value = (
            self.randn(batch, heads, steps, scene.head_dim).masked_fill(padding, STRAY).to(scene.dtype)
            for heads in (scene.heads, scene.kv_heads, scene.kv_heads)
        )
        return query, key, value

    def _state(self) -> LayerCache:
        """A linear cache after `past` tokens: random codes, the same in either order, random vectors in their slots."""
        scene, batch, rule = self.scene, len(self.scene.past), self.scene.config.rule
        capacity = rule.coded(scene.total)
        if scene.page:
            capacity = -(-capacity // scene.page) * scene.page
        codes = [
            from_token_order(
                torch.randint(-128, 128, (batch, capacity, b.code_bytes), generator=self.generator, device=self.device),
                b.code_run(scene.head_dim, scene.config.codes_by_head),
            )
            for b in (self.keys, self.values)
        ]
        empty = (rule.slot_tokens(self.past) < 0)[:, None, :, None]
        exact = [
            self.randn(batch, scene.kv_heads, rule.exact_slots, scene.head_dim).masked_fill(empty, STRAY)
            for _ in range(2)
        ]
        return LayerCache(*(c.to(torch.int8) for c in codes), *(x.to(scene.exact_dtype) for x in exact))

    def reference(self) -> tuple[torch.Tensor, LayerCache]:
        """Output in float64 and cache after; padding as zeros, which the reference needs."""
        steps = self.tokens[0].shape[2]
        real = (torch.arange(steps, device=self.device) < self.new[:, None])[:, None, :, None]
        tokens = (x.double() * real for x in self.tokens)
        return gsrq_attention(
            *tokens, self.cos, self.sin, self.past, self.new, self.cache, self.keys, self.values, self.scene.config
        )

    def call(self) -> CallTensors:
        """Fresh tensors of the call, paged where the scene says so."""
        cache, page, table = self.cache, self.scene.page, None
        codes = [cache.key_codes, cache.value_codes]
        if page:
            batch, per_row = codes[0].shape[0], codes[0].shape[1] // page
            order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(self.scene.seed))
            table = order.reshape(batch, per_row).to(torch.int32).to(self.device)
            cut = []
            for c in codes:
                pages = c.new_empty(max(1, batch * per_row), page, c.shape[2])
                pages[table.long()] = c.reshape(batch, per_row, page, c.shape[2])
                cut.append(pages)
            codes = cut
        parts = [guarded(x) for x in (*codes, cache.key_exact, cache.value_exact)]
        return CallTensors(*(x.clone() for x in self.tokens), self.past.clone(), self.new.clone(), *parts, table)

    def after(self, call: CallTensors) -> LayerCache:
        """The cache of a call as linear tensors."""
        codes = [call.key_codes, call.value_codes]
        if call.block_table is not None:
            codes = [c[call.block_table.long()].flatten(1, 2) for c in codes]
        return LayerCache(*codes, call.key_exact, call.value_exact)

    def advance(self, cache: LayerCache, steps: int) -> None:
        """Go on from a cache after the call: its tokens are past, new ones are drawn."""
        self.cache = LayerCache(*(x.clone() for x in vars(cache).values()))
        self.past = self.past + self.new
        self.new = self.new.clamp(max=steps)
        self.tokens = self.draw(steps)


def with_config(scene: Scene, **changes: object) -> Scene:
    return replace(scene, config=replace(scene.config, **changes))  # type: ignore[arg-type]

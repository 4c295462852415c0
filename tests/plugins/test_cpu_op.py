"""The CPU op in onnxruntime against gsrq_export.cache.reference: codes and buffers equal, outputs within 1e-4."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from attention_cases import random_codebook
from op_session import CACHE, FEEDS, OpSession, from_ort, to_ort

from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention
from gsrq_export.cache.rule import CODE_TILE, CacheRule, to_token_order
from gsrq_export.codec.codebook import Codebook

TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    """Shapes of a case; tokens are drawn by `tensors`."""

    config: AttentionConfig
    keys: Codebook
    values: Codebook
    heads: int
    kv_heads: int
    head_dim: int
    half_rope: int
    dtype: torch.dtype = torch.float16
    factor: float = 1.0  # of the rotary table, as YaRN has it

    def empty(self, batch: int, tokens: int) -> LayerCache:
        rule = self.config.rule
        shape = (batch, rule.coded(tokens) + rule.block, self.kv_heads, self.head_dim)
        return LayerCache.empty(*shape, self.keys, self.values, rule, self.dtype)

    def tensors(self, past: torch.Tensor, new: torch.Tensor, steps: int, positions: int, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def randn(heads: int) -> torch.Tensor:
            return torch.randn(len(past), heads, steps, self.head_dim, generator=generator)

        angle = torch.arange(positions)[:, None] * torch.logspace(0, -3, max(self.half_rope, 1))[: self.half_rope]
        return {
            "query": randn(self.heads),
            "key": randn(self.kv_heads),
            "value": randn(self.kv_heads),
            "cos": angle.cos() * self.factor,
            "sin": angle.sin() * self.factor,
            "past_lengths": past,
            "new_lengths": new,
        }

    def reference(self, tensors: Tensors, cache: LayerCache) -> tuple[torch.Tensor, LayerCache]:
        return gsrq_attention(*[tensors[name] for name in FEEDS], cache, self.keys, self.values, self.config)

    def session(self, library: Path, **options: object) -> OpSession:
        return OpSession(library, self.keys, self.values, self.config, self.dtype, **options)  # type: ignore[arg-type]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int8)


def assert_same(want: tuple[torch.Tensor, LayerCache], got: tuple[torch.Tensor, LayerCache]) -> None:
    for name in CACHE:
        assert torch.equal(bits(getattr(want[1], name)), bits(getattr(got[1], name))), f"present_{name} differs"
    assert torch.isfinite(got[0]).all()
    torch.testing.assert_close(got[0], want[0], atol=TOLERANCE, rtol=0)


def centered(book: Codebook) -> Codebook:
    """The codebook as one of keys in the rotated frame."""
    center = torch.randn(book.groups * book.width, generator=torch.Generator().manual_seed(11))
    return replace(book, center=center)


RULES = [(4, 64, 64), (0, 0, 1), (3, 5, 7), (0, 0, 3), (2, 0, 5), (1, 9, 4)]
RULES_BY_HEAD = [(4, 64, 64), (0, 0, 8), (3, 5, 16), (0, 0, 24), (2, 0, 40), (1, 9, 8)]


def random_setup(seed: int, rotated: bool = False, by_head: bool = False) -> Setup:
    """Odd shapes and options, drawn by seed."""
    draw = random.Random(seed)
    head_dim, kv_heads = draw.choice([16, 64, 96, 128, 30]), draw.choice([1, 2, 3, 4])
    widths = [w for w in (head_dim // 2, head_dim, 2 * head_dim, kv_heads * head_dim) if kv_heads * head_dim % w == 0]
    config = AttentionConfig(
        head_dim**-0.5,
        CacheRule(*draw.choice(RULES_BY_HEAD if by_head else RULES)),
        beam=draw.choice([1, 3]),
        rope_interleaved=draw.random() < 0.5,
        exact_prefill=draw.random() < 0.4,
        softcap=draw.choice([0.0, 0.0, 2.0]),
        sliding_window=draw.choice([0, 0, 0, 9, 150]),
        codes_by_head=by_head,
    )
    books = [
        random_codebook(
            kv_heads * head_dim, draw.choice(widths), draw.choice([1, 2, 3, 5, 8]), seed + side, draw.random() < 0.4
        )
        for side in range(2)
    ]
    if rotated:
        books[0] = centered(books[0])
    return Setup(
        config,
        *books,
        heads=kv_heads * draw.choice([1, 2, 3, 4, 8]),
        kv_heads=kv_heads,
        head_dim=head_dim,
        half_rope=draw.choice([head_dim // 2, head_dim // 2, head_dim // 4, 0]),
        dtype=draw.choice([torch.float16, torch.float32, torch.bfloat16]),
        factor=draw.choice([1.0, 1.3]),
    )


RANDOM = [(seed, rotated, False) for rotated in (False, True) for seed in range(16)]
RANDOM += [(seed, seed % 8 > 3, True) for seed in range(16, 32)]


@pytest.mark.parametrize(("seed", "rotated", "by_head"), RANDOM)
def test_random_shapes_and_options_equal_the_reference(
    seed: int, rotated: bool, by_head: bool, library: Path, isa: str
) -> None:
    setup, draw = random_setup(seed, rotated, by_head), random.Random(seed + 1000)
    batch, steps, before = draw.choice([1, 2, 3]), [1, 1, 3, 97][seed % 4], draw.choice([0, 50, 333])
    positions = before + steps + 5
    cache, past = setup.empty(batch, positions), torch.zeros(batch, dtype=torch.int64)
    if before:
        new = torch.tensor([before, *[draw.randint(0, before) for _ in range(batch - 1)]])
        _, cache = setup.reference(setup.tensors(past, new, before, positions, seed), cache)
        past = new
    new = torch.tensor([steps, *[draw.randint(0, steps) for _ in range(batch - 1)]])
    tensors = setup.tensors(past, new, steps, positions, seed + 1)
    session = setup.session(library, constant=seed % 5 != 0)
    assert_same(setup.reference(tensors, cache), session.run(tensors, cache))


def small_setup(dtype: torch.dtype = torch.float16, rotated: bool = False, **config: object) -> Setup:
    rule = CacheRule(2, 5, 8 if config.get("codes_by_head") else 4)
    attention = replace(AttentionConfig(0.2, rule), **config)  # type: ignore[arg-type]
    keys = random_codebook(64, 32, 5, 1)
    return Setup(attention, centered(keys) if rotated else keys, random_codebook(64, 64, 4, 2), 6, 2, 32, 16, dtype)


def run_in_pieces(
    session: OpSession, setup: Setup, whole: Tensors, pieces: list[int]
) -> tuple[torch.Tensor, LayerCache]:
    total = sum(pieces)
    cache, outputs, start = setup.empty(1, total), [], 0
    for piece in pieces:
        part = {**whole, "past_lengths": torch.tensor([start]), "new_lengths": torch.tensor([piece])}
        part |= {name: whole[name][:, :, start : start + piece] for name in ("query", "key", "value")}
        output, cache = session.run(part, cache)
        outputs.append(output)
        start += piece
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_pieces_do_not_matter(dtype: torch.dtype, rotated: bool, library: Path, isa: str) -> None:
    setup, total = small_setup(dtype, rotated), 101  # past 64 coded tokens the table-free decode path takes over
    whole = setup.tensors(torch.tensor([0]), torch.tensor([total]), total, total, 3)
    session = setup.session(library)
    once = run_in_pieces(session, setup, whole, [total])
    assert_same(setup.reference(whole, setup.empty(1, total)), once)
    assert_same(once, run_in_pieces(session, setup, whole, [17, 1, 40, 1, 2, 40]))
    assert_same(once, run_in_pieces(session, setup, whole, [1] * total))


# Key and value widths of 4 heads of 16: several sub-vectors a head, one a head, one of several heads.
WIDTHS = [(16, 16, 0), (8, 4, 0), (32, 64, 0), (64, 8, 83), (16, 32, 83)]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("key_width", "value_width", "sliding_window"), WIDTHS)
def test_the_order_of_codes_changes_no_bit(
    key_width: int, value_width: int, sliding_window: int, rotated: bool, library: Path, isa: str
) -> None:
    """A cache that grows in several calls; the sliding window's first row lies within a tile of 8."""
    keys, values = random_codebook(64, key_width, 5, 1), random_codebook(64, value_width, 3, 2)
    config = AttentionConfig(0.25, CacheRule(3, 5, 8), sliding_window=sliding_window)
    by_token = Setup(config, centered(keys) if rotated else keys, values, 8, 4, 16, 8)
    by_head = replace(by_token, config=replace(config, codes_by_head=True))
    pieces, total = [17, 1, 1, 80, *[1] * 12], 111
    whole = by_token.tensors(torch.tensor([0]), torch.tensor([total]), total, total, 3)
    output, cache = run_in_pieces(by_token.session(library), by_token, whole, pieces)
    other, stored = run_in_pieces(by_head.session(library), by_head, whole, pieces)
    assert torch.equal(output, other)
    for name, book in (("key_codes", keys), ("value_codes", values)):
        codes, run = getattr(stored, name), book.code_run(16, by_head=True)
        assert torch.equal(to_token_order(codes, run), getattr(cache, name))
        assert torch.equal(codes, getattr(cache, name)) == (run == book.code_bytes)


@pytest.mark.parametrize("exact_prefill", [False, True])
def test_a_later_token_changes_no_earlier_output(exact_prefill: bool, library: Path, isa: str) -> None:
    setup, total, at = small_setup(exact_prefill=exact_prefill), 70, 41
    session = setup.session(library)
    whole = setup.tensors(torch.tensor([0]), torch.tensor([total]), total, total, 4)
    changed = {name: tensor.clone() for name, tensor in whole.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, at] += 1
    first, _ = session.run(whole, setup.empty(1, total))
    second, _ = session.run(changed, setup.empty(1, total))
    assert torch.equal(first[:, :at], second[:, :at])
    assert not torch.equal(first[:, at:], second[:, at:])


def test_rows_of_a_batch_do_not_touch_each_other(library: Path) -> None:
    setup, steps = small_setup(), 60
    session = setup.session(library)
    new = torch.tensor([60, 0, 33, 1])
    tensors = setup.tensors(torch.zeros(4, dtype=torch.int64), new, steps, steps, 5)
    cache = setup.empty(4, steps)
    for name in ("query", "key", "value"):  # padding may hold anything
        for b, n in enumerate(new.tolist()):
            tensors[name][b, :, n:] = float("nan")
    cache.key_exact[1] = 7.0
    output, after = session.run(tensors, cache)
    assert torch.isfinite(output).all()
    for b, n in enumerate(new.tolist()):
        assert not output[b, n:].any()
        alone = {name: t if name in ("cos", "sin") else t[b : b + 1] for name, t in tensors.items()}
        row = LayerCache(*[getattr(cache, name)[b : b + 1] for name in CACHE])
        single, row_after = session.run(alone, row)
        assert torch.equal(single[0], output[b])
        for name in CACHE:
            assert torch.equal(getattr(after, name)[b], getattr(row_after, name)[0])
    assert torch.equal(after.key_exact[1], cache.key_exact[1])


def long_setup(width: int, stages: int, rotated: bool = False, **config: object) -> Setup:
    keys, values = (random_codebook(256, width, stages, seed) for seed in (1, 2))
    if rotated:
        keys = centered(keys)
    attention = AttentionConfig(128**-0.5, **config)  # type: ignore[arg-type]
    return Setup(attention, keys, values, 8, 2, 128, 64)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("width", "stages", "tokens", "by_head", "sliding_window"),
    [(128, 3, 9000, False, 0), (256, 5, 4300, False, 0), (128, 3, 9000, True, 8955), (256, 5, 4300, True, 0)],
)
def test_long_context_splits_and_threads_do_not_change_a_bit(
    width: int, stages: int, tokens: int, by_head: bool, sliding_window: int, rotated: bool, library: Path, isa: str
) -> None:
    setup = long_setup(width, stages, rotated, codes_by_head=by_head, sliding_window=sliding_window)
    past = torch.tensor([tokens])
    tensors = setup.tensors(past, torch.tensor([1]), 1, tokens + 1, 6)
    cache = setup.empty(1, tokens + 1)
    generator = torch.Generator().manual_seed(7)
    for name in CACHE[:2]:
        getattr(cache, name).random_(-128, 128, generator=generator)
    for name in CACHE[2:]:
        getattr(cache, name).normal_(generator=generator)
    outputs = []
    for threads in (1, 2, 3):
        session = setup.session(library, threads=threads)
        outputs += [session.run(tensors, cache) for _ in range(2)]
    assert_same(setup.reference(tensors, cache), outputs[0])
    for output, _ in outputs[1:]:
        assert torch.equal(output, outputs[0][0])


@pytest.mark.parametrize("rotated", [False, True])
def test_a_rotary_table_that_does_not_compose_is_followed(rotated: bool, library: Path, isa: str) -> None:
    setup, tokens = long_setup(128, 3, rotated), 400
    tensors = setup.tensors(torch.tensor([tokens]), torch.tensor([1]), 1, tokens + 1, 6)
    generator = torch.Generator().manual_seed(8)
    angle = torch.rand(tokens + 1, 64, generator=generator) * 6
    tensors |= {"cos": angle.cos(), "sin": angle.sin()}
    cache = setup.empty(1, tokens + 1)
    for name in CACHE[:2]:
        getattr(cache, name).random_(-128, 128, generator=generator)
    assert_same(setup.reference(tensors, cache), setup.session(library).run(tensors, cache))


def bind(session: OpSession, tensors: Tensors, cache: LayerCache):  # type: ignore[no-untyped-def]
    """One OrtValue as input and output of each cache tensor."""
    binding = session.session.io_binding()
    values = {name: to_ort(tensors[name]) for name in FEEDS} | {name: to_ort(getattr(cache, name)) for name in CACHE}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    for name in CACHE:
        binding.bind_ortvalue_output(f"present_{name}", values[name])
    return binding, values


@pytest.mark.parametrize("by_head", [False, True])
def test_io_binding_updates_the_cache_in_place(by_head: bool, library: Path) -> None:
    setup, steps = small_setup(codes_by_head=by_head), 40
    tensors = setup.tensors(torch.tensor([0]), torch.tensor([steps]), steps, steps + 1, 9)
    cache = setup.empty(1, steps + 30)
    cache.key_codes[:] = cache.value_codes[:] = 99  # rows past the coded ones must keep this
    want = setup.reference(tensors, cache)
    session = setup.session(library)
    binding, values = bind(session, tensors, cache)
    pointers = [values[name].data_ptr() for name in CACHE]
    session.session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    assert [value.data_ptr() for value in outputs[1:]] == pointers
    types = [torch.int8, torch.int8, setup.dtype, setup.dtype]
    after = LayerCache(*[from_ort(values[name], dtype) for name, dtype in zip(CACHE, types, strict=True)])
    assert_same(want, (from_ort(outputs[0], torch.float32), after))
    assert (after.key_codes[:, setup.config.rule.coded(steps) :] == 99).all()  # whole tiles, in either order


BAD_LENGTHS = [
    ("past_lengths", -1, r"past_lengths\[0\] is -1, must be 0 or more"),
    ("new_lengths", -2, r"new_lengths\[0\] is -2, must be 0 to 8, the steps of query"),
    ("new_lengths", 9, r"new_lengths\[0\] is 9, must be 0 to 8, the steps of query"),
    ("past_lengths", 93, "row 0: 101 tokens exceed the rotary table's 100 positions"),
    ("past_lengths", 60, "row 0: 60 coded tokens exceed the cache's capacity of 44"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_LENGTHS)
def test_bad_lengths_are_refused_before_anything_is_written(name: str, value: int, message: str, library: Path) -> None:
    setup = small_setup()
    tensors = setup.tensors(torch.tensor([0]), torch.tensor([8]), 8, 100, 10)
    tensors[name] = torch.tensor([value])
    cache = setup.empty(1, 50)
    session = setup.session(library)
    binding, values = bind(session, tensors, cache)
    with pytest.raises(Exception, match=f"GsrqAttention: {message}"):
        session.session.run_with_iobinding(binding)
    for field in CACHE:
        tensor = getattr(cache, field)
        assert torch.equal(bits(from_ort(values[field], tensor.dtype)), bits(tensor))


BAD_SHAPES = [
    ("key", (1, 2, 7, 32), r"key has shape \[1, 2, 7, 32\], expected \[1, 2, 8, 32\]"),
    ("value", (1, 1, 8, 32), r"value has shape \[1, 1, 8, 32\], expected \[1, 2, 8, 32\]"),
    ("query", (1, 5, 8, 32), "query has 5 heads, which must be a multiple of key's 2"),
    ("query", (8, 32), r"query has shape \[8, 32\], expected 4 dimensions"),
    ("query", (1, 6, 8, 31), r"query has shape \[1, 6, 8, 31\]: head_dim must be even and positive"),
    ("cos", (100, 17), "rope_dim 34 exceeds head_dim 32"),
    ("sin", (99, 16), r"sin has shape \[99, 16\], expected \[100, 16\]"),
    ("past_lengths", (2,), r"past_lengths has shape \[2\], expected \[1\]"),
    ("key_codes", (1, 44, 11), r"key_codes has shape \[1, 44, 11\], expected \[1, 44, 10\]"),
    ("value_codes", (1, 43, 4), r"value_codes has shape \[1, 43, 4\], expected \[1, 44, 4\]"),
    ("key_exact", (1, 2, 12, 32), r"key_exact has shape \[1, 2, 12, 32\], expected \[1, 2, 11, 32\]"),
    ("value_exact", (1, 2, 11, 16), r"value_exact has shape \[1, 2, 11, 16\], expected \[1, 2, 11, 32\]"),
    ("key_codebooks", (2, 5, 255, 32), r"key_codebooks has shape .*, expected \[groups, stages, 256, width\]"),
    ("key_codebooks", (3, 5, 256, 32), r"groups \* width must be KV heads \* head_dim = 64"),
    ("value_transform", (1, 64, 63), r"value_transform has shape \[1, 64, 63\], expected \[1, 64, 64\]"),
]


@pytest.mark.parametrize(("name", "shape", "message"), BAD_SHAPES)
def test_shapes_that_disagree_are_named(name: str, shape: tuple[int, ...], message: str, library: Path) -> None:
    setup = small_setup()
    tensors = setup.tensors(torch.tensor([0]), torch.tensor([8]), 8, 100, 10)
    cache = setup.empty(1, 50)
    session = setup.session(library, constant=False)
    if name in FEEDS:
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    elif name in CACHE:
        setattr(cache, name, torch.zeros(shape, dtype=getattr(cache, name).dtype))
    else:
        dtype = torch.float16 if "codebooks" in name else torch.float32
        session.books[name] = to_ort(torch.zeros(shape, dtype=dtype))
    with pytest.raises(Exception, match=f"GsrqAttention: .*{message}"):
        session.run(tensors, cache)


BAD_ATTRIBUTES = [
    ({"scale": 0.0}, "attribute scale is 0, must be positive"),
    ({"block": 0}, "attribute block is 0, must be 1 or more"),
    ({"sinks": -1}, "attribute sinks is -1, must be 0 or more"),
    ({"beam": 0}, "attribute beam is 0, must be 1 to 256"),
    ({"beam": 257}, "attribute beam is 257, must be 1 to 256"),
    ({"softcap": -1.0}, "attribute softcap is -1, must be 0"),
    ({"rope_interleaved": 2}, "attribute rope_interleaved is 2, must be 0 or 1"),
    ({"key_frame": 2}, "attribute key_frame is 2, must be 0 or 1"),
    ({"code_order": 2}, "attribute code_order is 2, must be 0 or 1"),
    ({"code_order": 1}, "attribute block is 4, must be a multiple of 8 where code_order is 1"),
    ({"beam": 1.0}, "attribute beam must be an int, is a float"),
    ({"scale": 1}, "attribute scale must be a float, is an int"),
]


@pytest.mark.parametrize(("attribute", "message"), BAD_ATTRIBUTES)
def test_bad_attributes_stop_the_session(attribute: dict[str, int | float], message: str, library: Path) -> None:
    with pytest.raises(Exception, match=f"GsrqAttention: {message}"):
        small_setup().session(library, **attribute)


def test_codes_by_head_need_a_capacity_of_whole_tiles(library: Path) -> None:
    setup = small_setup(codes_by_head=True)
    tensors = setup.tensors(torch.tensor([0]), torch.tensor([8]), 8, 100, 10)
    cache = setup.empty(1, 50)
    rows = cache.key_codes.shape[1]
    assert rows % CODE_TILE == 0
    cache.key_codes, cache.value_codes = cache.key_codes[:, 1:], cache.value_codes[:, 1:]
    message = rf"key_codes has shape \[1, {rows - 1}, 10\]: capacity must be a multiple of 8 where code_order is 1"
    with pytest.raises(Exception, match=f"GsrqAttention: {message}"):
        setup.session(library).run(tensors, cache)


def test_an_unknown_instruction_set_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSRQ_CPU_ISA", "mmx")
    with pytest.raises(Exception, match="GSRQ_CPU_ISA must be generic"):
        small_setup().session(library)


def test_a_center_goes_with_the_rotated_frame_and_only_with_it(library: Path) -> None:
    tensors = small_setup().tensors(torch.tensor([0]), torch.tensor([8]), 8, 100, 10)
    for setup, frame, message in (
        (small_setup(rotated=True), 0, "key_center is given, but attribute key_frame is 0"),
        (small_setup(), 1, r"key_center has shape \[\], expected \[64\]"),
    ):
        with pytest.raises(Exception, match=f"GsrqAttention: {message}"):
            setup.session(library, key_frame=frame).run(tensors, setup.empty(1, 50))

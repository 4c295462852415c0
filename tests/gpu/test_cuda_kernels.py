"""The CUDA kernels against the reference: codes and exact buffers to the bit, outputs within the types' precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, Case, random_codebook
from cuda_calls import cache_to, layer_of_case, linear, paged
from cuda_scenes import Scene, Stage, grid_codebook, intact, random_scene, with_config
from sanitizer import TOOLS, assert_clean

from gsrq_export import CacheRule, Codebook, GsrqError, native
from gsrq_export.cache.reference import AttentionConfig, LayerCache
from gsrq_export.cuda import Call, CallTensors, CudaLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.find(native.CUDA) is None, reason="no CUDA library is built: gsrq plugins build --cuda"),
]

DEVICE = "cuda"
# Decoding multiplies queries and keys as float16 whatever the type of the call; bfloat16's rounding alone is 1.7e-3.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-3}
DECODE = Scene((301, 17, 0, 96), (1, 1, 1, 0))
WIDE = replace(DECODE, head_dim=128, half_rope=64, keys=(128, 16), values=(128, 16), heads=8)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def launch(layer: CudaLayer, tensors: CallTensors, max_total: int | None = None) -> torch.Tensor:
    """The whole operator, on poisoned output and workspace."""
    call = Call(layer, tensors, max_total)
    call.output.fill_(float("nan"))
    call.workspace.fill_(0xFF)
    return call.run()


def assert_close(output: torch.Tensor, expected: torch.Tensor, new: torch.Tensor, limit: float = 0) -> None:
    """Row by row ||output - expected|| / ||expected||; zero in the padding."""
    assert torch.isfinite(output).all(), f"{int((~torch.isfinite(output)).sum())} entries were not written"
    limit, off = limit or TOLERANCE[output.dtype], output.double() - expected.double()
    for b, count in enumerate(new.tolist()):
        assert not output[b, count:].any(), f"row {b}: padding is not zero"
        if count:
            error = float(off[b, :count].norm() / expected[b, :count].norm())
            assert error < limit, f"row {b}: relative error {error:.2e}, allowed {limit}"


def assert_same(got: LayerCache, expected: LayerCache) -> None:
    """All of the cache, what must not have been touched included."""
    for name, tensor in vars(expected).items():
        other = getattr(got, name)
        assert other.shape == tensor.shape
        bits = torch.int8 if tensor.dtype == torch.int8 else torch.int16 if tensor.element_size() == 2 else torch.int32
        odd = (other.contiguous().view(bits) != tensor.contiguous().view(bits)).nonzero()
        assert not len(odd), f"{name}: {len(odd)} of {tensor.numel()} differ, the first at {odd[0].tolist()}"


def check(stage: Stage, max_total: int | None = None, limit: float = 0) -> tuple[torch.Tensor, LayerCache]:
    """One call against the reference; the reference's cache after."""
    output, after = stage.reference()
    tensors = stage.call()
    got = launch(stage.layer, tensors, max_total)
    assert_same(stage.after(tensors), after)
    for name in ("key_codes", "value_codes", "key_exact", "value_exact"):
        assert intact(getattr(tensors, name)), f"{name}: something was written beside it"
    assert_close(got, output, stage.new, limit)
    return got, after


def check_both(scene: Scene, limit: float = 0) -> None:
    """One call against the reference with codes ordered by token, and by head: the same bits."""
    by_token, _ = check(Stage(scene, DEVICE), limit=limit)
    by_head, _ = check(Stage(with_config(scene, codes_by_head=True), DEVICE), limit=limit)
    assert torch.equal(by_head.view(torch.int8), by_token.view(torch.int8))


def slices(case: Case, start: int, stop: int) -> list[torch.Tensor]:
    """The part's tokens and lengths: query, key, value, past, new on the device."""
    data = case.data()
    new = (data.lengths.clamp(max=stop) - start).clamp(min=0)
    tensors = [x[:, :, start:stop].contiguous() for x in (data.query, data.key, data.value)]
    return [t.to(DEVICE) for t in (*tensors, data.lengths.clamp(max=start), new)]


@pytest.mark.parametrize("page", [0, 4, 5])
@pytest.mark.parametrize("chunk", [37, 10, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_shared_cases_in_parts_of_any_size(case: Case, chunk: int, page: int) -> None:
    if case.config.exact_prefill and chunk != case.steps:
        pytest.skip("what exact prefill shows depends on the parts")
    data = case.data()
    output, after = case.run(data)
    layer = layer_of_case(case, data, DEVICE)
    cache = cache_to(case.empty(), DEVICE)
    cache, table = paged(cache, page) if page else (cache, None)
    parts = []
    for start in range(0, case.steps, chunk):
        tensors = slices(case, start, start + chunk)
        parts.append(launch(layer, CallTensors(*tensors, *vars(cache).values(), table)))
    assert_close(torch.cat(parts, 1).cpu(), output, data.lengths)
    if table is not None:
        whole = linear(cache, table, after.key_codes.shape[1])
        for b, n in enumerate(case.config.rule.coded(data.lengths).tolist()):
            assert torch.equal(whole.key_codes[b, :n].cpu(), after.key_codes[b, :n])
            assert torch.equal(whole.value_codes[b, :n].cpu(), after.value_codes[b, :n])
        cache = LayerCache(after.key_codes, after.value_codes, whole.key_exact, whole.value_exact)
    assert_same(cache_to(cache, "cpu"), after)


@pytest.mark.parametrize("seed", range(90))
def test_random_scenes(seed: int) -> None:
    scene = random_scene(seed)
    print(scene)
    stage = Stage(scene, DEVICE)
    _, after = check(stage)
    stage.advance(after, 1)  # and a decoding step from there, with what is left of the table
    if int((stage.past + stage.new).max()) <= scene.total:
        check(stage)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decode_for_any_number_of_query_heads(head_dim: int, group: int, rotated: bool) -> None:
    scene = replace(DECODE, heads=2 * group, head_dim=head_dim, half_rope=head_dim // 2, seed=group, rotated=rotated)
    check_both(replace(scene, keys=(head_dim, 5), values=(head_dim, 7)))


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 33])
def test_decode_for_any_number_of_stages(stages: int, grid: bool) -> None:
    scene = replace(WIDE, keys=(128, stages), values=(128, 1 + stages // 3), grid=grid, seed=stages)
    check_both(scene)
    check_both(replace(scene, keys=(256, stages), values=(64, stages)))


@pytest.mark.parametrize(
    "stages", [(1, 1), (3, 9), (4, 4), (8, 8), (12, 12), (16, 8), (16, 16), (24, 8), (17, 12), (32, 33)]
)
def test_decode_in_the_rotated_frame_for_any_number_of_stages(stages: tuple[int, int]) -> None:
    """By lookups as far as tables and bins fit into shared memory, else by the prefill kernels."""
    scene = replace(WIDE, keys=(128, stages[0]), values=(128, stages[1]), rotated=True, seed=stages[0])
    check_both(scene)
    check_both(replace(scene, keys=(256, stages[0]), values=(64, stages[1])))
    check_both(replace(scene, keys=(64, stages[0]), values=(256, stages[1]), page=16))


def test_the_form_of_the_codebooks_is_seen() -> None:
    assert Stage(WIDE, DEVICE).layer.planes == 1
    assert Stage(replace(WIDE, grid=False), DEVICE).layer.planes == 2
    assert Stage(WIDE, DEVICE).layer.geometric
    assert Stage(replace(WIDE, rope="scaled"), DEVICE).layer.geometric
    assert not Stage(replace(WIDE, rope="random"), DEVICE).layer.geometric
    wide = grid_codebook(256, 128, 16, 1)
    words = wide.codewords.clone()
    words[:, 3] *= 2.0**-10  # more powers of two apart than int8 stages can be brought together
    data = CASES[0].data()
    layer = CudaLayer(2, 128, Codebook(words, wide.transform), wide, data.cos, data.sin, AttentionConfig(0.1), DEVICE)
    assert layer.planes == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "traits",
    [
        {},
        {"grid": False},
        {"rope": "float32"},
        {"rope": "random"},
        {"page": 64},
        {"rotated": True},
        {"rotated": True, "page": 64},
        {"rotated": True, "rope": "random"},
        {"rotated": True, "rope": "scaled"},
        {"rotated": True, "rope": "float32", "grid": False},
    ],
    ids=str,
)
def test_long_caches(traits: dict[str, object], dtype: torch.dtype) -> None:
    rule = AttentionConfig(128**-0.5, CacheRule(4, 64, 64))
    scene = replace(WIDE, past=(20011, 7001, 131, 0), new=(1, 1, 1, 1), dtype=dtype, config=rule, seed=5)
    scene = replace(scene, **traits)  # type: ignore[arg-type]
    check_both(scene)
    check(Stage(scene, DEVICE), 20012)


@pytest.mark.parametrize("page", [8, 16, 48, 64, 2048])
@pytest.mark.parametrize(
    "traits",
    [
        {},
        {"config": AttentionConfig(0.1, CacheRule(4, 64, 8), codes_by_head=True)},
        {"heads": 16, "keys": (128, 12)},
        {"keys": (256, 12), "values": (256, 12)},
        {"keys": (128, 24), "values": (128, 8)},
        {"keys": (64, 4), "values": (64, 4), "past": tuple(range(50, 650, 6)), "new": (1,) * 100},
        {"past": tuple(range(4000, 6640, 40)), "new": (1,) * 66},  # pages are looked up more than once in a stretch
        {"rotated": True},
        {"rotated": True, "values": (128, 8)},
        {"rotated": True, "keys": (64, 20), "values": (128, 8), "past": tuple(range(4000, 6640, 40)), "new": (1,) * 66},
        {"rotated": True, "keys": (64, 24), "values": (128, 8), "past": (66, 9003, 40000), "new": (1, 1, 1)},
        {"rotated": True, "values": (64, 16), "past": tuple(range(50, 650, 6)), "new": (1,) * 100},
        {"config": AttentionConfig(0.1, CacheRule(4, 64, 8), sliding_window=1000, codes_by_head=True)},
    ],
    ids=str,
)
def test_pages_give_the_bits_of_a_linear_cache(traits: dict[str, object], page: int) -> None:
    """Words are read of pages that are a power of two of tokens, 16 at least, in the rotated frame 32; of others bytes.

    A sliding window, whose first token may lie anywhere, reads bytes, too.
    """
    rule = AttentionConfig(0.1, CacheRule(4, 64, 8))
    scene = replace(WIDE, past=(9003, 2048 + 4 + 64, 700, 66, 0), new=(1,) * 5, config=rule, page=page)
    stage = Stage(replace(scene, **traits), DEVICE)  # type: ignore[arg-type]
    output, _ = check(stage)
    if page not in (8, 48) and not stage.scene.config.sliding_window:
        stage.scene = replace(stage.scene, page=0)  # the same codes
        assert torch.equal(output, launch(stage.layer, stage.call()))


@pytest.mark.parametrize("stages", [(16, 8), (24, 8)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
def test_few_and_many_rows_in_the_rotated_frame(rows: int, stages: tuple[int, int]) -> None:
    """Up to four rows turn their queries beside the tables, more have a launch for it; long, short and empty rows."""
    past = (5003, 700, 0, 90, 3100, 64, 1500, 2, 4099)[:rows]
    scene = replace(WIDE, keys=(128, stages[0]), values=(128, stages[1]), past=past, new=(1,) * rows, rotated=True)
    check_both(scene)
    check(
        Stage(replace(scene, keys=(256, stages[0]), values=(256, stages[1]), dtype=torch.bfloat16, seed=rows), DEVICE)
    )


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("past", [(300,) * 100, tuple(range(150, 350, 2))], ids=["equal", "ragged"])
def test_more_rows_than_blocks(past: tuple[int, ...], rotated: bool) -> None:
    """A block, or a cluster of some, goes through several rows, whole ones or with a stretch of one."""
    scene = replace(WIDE, keys=(128, 24), values=(128, 8), past=past, new=(1,) * len(past), rotated=rotated)
    check_both(scene)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("values", [(128, 7), (128, 16), (64, 8)], ids=str)
def test_many_rows_whose_value_slots_are_summed_together(values: tuple[int, int], rotated: bool) -> None:
    """A block takes two slots or more of a sub-vector, and what is left of an odd number of stages."""
    past = tuple(range(100, 400, 2))
    scene = replace(WIDE, kv_heads=8, heads=32, values=values, past=past, new=(1,) * len(past), rotated=rotated)
    check_both(scene)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("traits", [{"softcap": 3.0}, {"sliding_window": 1000}, {"sliding_window": 9}], ids=str)
def test_long_caches_with_masks(traits: dict[str, object], rotated: bool) -> None:
    config = AttentionConfig(0.1, CacheRule(4, 64, 64))
    scene = replace(WIDE, past=(6011, 700), new=(1, 1), config=config, rotated=rotated)
    check_both(with_config(scene, **traits))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("exact_prefill", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_long_prefill(dtype: torch.dtype, exact_prefill: bool, rotated: bool) -> None:
    config = AttentionConfig(128**-0.5, CacheRule(4, 64, 64), exact_prefill=exact_prefill)
    scene = replace(WIDE, past=(0, 1500, 129), new=(1100, 700, 0), dtype=dtype, config=config, keys=(128, 4))
    check_both(replace(scene, rotated=rotated))


def test_scores_far_apart() -> None:
    """Weights from 1 down to what float32 cannot hold: the running maximum must be kept right over all splits.

    Scores are hundreds, so float16 products are off by a tenth and the weights of near ties by as much.
    """
    scene = replace(WIDE, past=(9000, 40, 700), new=(1, 1, 1), dtype=torch.float32, grid=True)
    check_both(with_config(scene, scale=2.0), limit=0.05)
    check_both(with_config(replace(scene, new=(20, 3, 7)), scale=2.0), limit=1e-4)
    check_both(with_config(replace(scene, rotated=True), scale=2.0), limit=0.01)


@pytest.mark.parametrize(
    "scene",
    [
        WIDE,
        replace(WIDE, new=(70, 9, 0, 33)),
        replace(WIDE, past=(9000, 0, 3, 500)),
        replace(WIDE, past=(90000, 0, 3, 500), rotated=True),
    ],
    ids=str,
)
def test_the_same_bits_run_to_run(scene: Scene) -> None:
    stage = Stage(scene, DEVICE)
    first, again = stage.call(), stage.call()
    outputs = [launch(stage.layer, first), launch(stage.layer, again)]
    assert torch.equal(outputs[0].view(torch.int16), outputs[1].view(torch.int16))
    assert_same(stage.after(again), stage.after(first))


def test_the_parts_are_the_whole() -> None:
    stage = Stage(replace(WIDE, new=(70, 9, 0, 33)), DEVICE)
    whole, parts = stage.call(), stage.call()
    expected = launch(stage.layer, whole)
    call = Call(stage.layer, parts)
    call.output.fill_(float("nan"))
    for part in ("encode", "attend", "append"):
        call.run(part)  # type: ignore[arg-type]
    assert torch.equal(call.output, expected)
    assert_same(stage.after(parts), stage.after(whole))


@pytest.mark.parametrize(
    "scene",
    [
        WIDE,
        replace(WIDE, page=8),
        with_config(WIDE, codes_by_head=True),
        with_config(replace(WIDE, page=8), codes_by_head=True),
        replace(WIDE, rope="random", dtype=torch.bfloat16),
        replace(WIDE, rotated=True),
        replace(WIDE, rotated=True, page=8),
        with_config(replace(WIDE, rotated=True), codes_by_head=True),
    ],
    ids=str,
)
def test_a_cuda_graph_is_replayed_while_the_sequences_grow(scene: Scene) -> None:
    """Captured once by way of the torch operator; blocks leave the window on the way, rows pause."""
    stage = Stage(replace(scene, spare=40, new=(1, 1, 1, 1)), DEVICE)
    tensors = stage.call()
    cache = LayerCache(tensors.key_codes, tensors.value_codes, tensors.key_exact, tensors.value_exact)

    def step() -> torch.Tensor:
        return stage.layer(*tensors[:5], cache, tensors.block_table)

    saved = [x.clone() for x in vars(cache).values()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # kernels load on their first launch
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for x, content in zip(vars(cache).values(), saved, strict=True):
        x.copy_(content)
    for t in range(30):
        stage.new = torch.tensor([1, 1, int(t % 3 > 0), 1], device=DEVICE)
        stage.tokens = stage.draw(1)
        expected, after = stage.reference()
        for x, content in zip(tensors[:5], (*stage.tokens, stage.past, stage.new), strict=True):
            x.copy_(content)
        output.fill_(float("nan"))
        graph.replay()
        assert_same(stage.after(tensors), after)
        # bfloat16's worst row here is off by 2.1e-3, its rounding of 1.7e-3 included.
        assert_close(output, expected, stage.new, 2.5e-3 if scene.dtype == torch.bfloat16 else 0)
        stage.cache, stage.past = after, stage.past + stage.new


def test_torch_compile_keeps_the_operator_in_one_graph() -> None:
    stage = Stage(replace(WIDE, spare=8), DEVICE)
    backend = "inductor"
    try:
        import triton  # noqa: F401
    except ImportError:
        backend = "aot_eager"

    def step(query: torch.Tensor, x: CallTensors) -> torch.Tensor:
        cache = LayerCache(x.key_codes, x.value_codes, x.key_exact, x.value_exact)
        return stage.layer(query * 2, *x[1:5], cache, x.block_table) + 1

    eager, fast = stage.call(), stage.call()
    expected = step(eager.query, eager)
    got = torch.compile(step, fullgraph=True, backend=backend)(fast.query, fast)
    torch.testing.assert_close(got, expected)
    assert_same(stage.after(fast), stage.after(eager))


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize(
    ("total", "width", "stages"),
    [
        (6, 3, 3),
        (64, 64, 9),
        (128, 128, 16),
        (240, 120, 4),
        (256, 128, 1),
        (256, 16, 4),
        (96, 48, 33),
        (1024, 256, 5),
        (512, 256, 1),
        (260, 130, 3),
        (404, 202, 2),
        (508, 254, 4),
        (288, 144, 17),
        (512, 512, 8),
        (2048, 2048, 2),
    ],
)
def test_codes_of_vectors(total: int, width: int, stages: int, beam: int) -> None:
    for seed, (book, transform) in enumerate((b, t) for b in (random_codebook, grid_codebook) for t in (False, True)):
        keys = book(total, width, stages, seed, transform).to(DEVICE)
        heads = (d for d in (256, 128, 96, 64, 6, width) if total % d == 0)
        head_dim = next(d for d in heads if width % d == 0 or d % width == 0)
        tables, config = torch.ones(2, 4, 0), AttentionConfig(1.0, beam=beam)
        layer = CudaLayer(total // head_dim, head_dim, keys, keys, *tables, config, DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for dtype, rows in ((torch.float32, 257), (torch.float16, 64), (torch.bfloat16, 3)):
            x = (1.5 * torch.randn(rows, total, generator=generator, device=DEVICE)).to(dtype)
            x[0], x[-1] = 0, x[-1] * 100
            for side in ("keys", "values"):
                codes = layer.encode(x, side)
                assert torch.equal(codes, keys.encode(x, beam)), (seed, dtype, side)


@pytest.mark.parametrize(
    ("total", "width", "stages"), [(1024, 128, 5), (512, 64, 7), (240, 120, 3), (1024, 256, 5), (360, 180, 6)]
)
@pytest.mark.parametrize("transform", [False, True])
def test_codes_of_many_vectors(total: int, width: int, stages: int, transform: bool) -> None:
    """More than one block a multiprocessor, the last of them partly filled."""
    book = random_codebook(total, width, stages, 3, transform).to(DEVICE)
    head_dim = next(d for d in (128, 64, 6) if total % d == 0 and width % d == 0)
    tables = torch.ones(2, 4, 0)
    layer = CudaLayer(total // head_dim, head_dim, book, book, *tables, AttentionConfig(1.0), DEVICE)
    x = torch.randn(9001, total, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    for side in ("keys", "values"):
        codes = layer.encode(x, side)
        assert torch.equal(codes, book.encode(x))
        assert torch.equal(codes, layer.encode(x, side))


@pytest.mark.parametrize("width", [50, 64, 119, 128, 130, 200, 254, 256])
@pytest.mark.parametrize("metric", ["identity", "diagonal", "full"])
@pytest.mark.parametrize("words", ["random", "twins", "one side", "small"])
def test_codes_for_every_kind_of_codebook(width: int, metric: str, words: str) -> None:
    """Twins differ in the last bit of one element, a large one: else a vector that is a codeword is as near to its twin
    in float64. Codewords on one side have negative products with half of the vectors; small ones stand far below the
    vectors. Some vectors are zero, tiny, large or a codeword."""
    generator = torch.Generator().manual_seed(width)
    book = random_codebook(2 * width, width, 3, width, metric == "full")
    codewords, transform = book.codewords.float(), book.transform
    if metric == "diagonal":
        transform = transform * (0.5 + torch.rand(2, width, 1, generator=generator))
    if words == "one side":
        codewords = 3 + 0.1 * codewords
    if words == "small":
        codewords = codewords * 1e-3
    half = codewords.half()
    if words == "twins":
        half[..., width // 2] += half[..., width // 2].sign() + 0.5
        half[:, :, 1::2] = half[:, :, ::2]
        bits = half.view(torch.int16)
        bits[:, :, 1::2, width // 2] ^= 1
    book = Codebook(half, transform).to(DEVICE)
    tables = torch.ones(2, 4, 0)
    head_dim = width if width % 2 == 0 else 2 * width
    layer = CudaLayer(2 * width // head_dim, head_dim, book, book, *tables, AttentionConfig(1.0), DEVICE)
    x = torch.randn(200, 2 * width, generator=generator)
    x[::7] = 0
    x[1::7] *= 1e-4
    x[2::7] *= 1e3
    x[3::7] = half[:, 0, :29].transpose(0, 1).flatten(1).float()
    x = x.to(DEVICE)
    assert torch.equal(layer.encode(x, "keys"), book.encode(x))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(
    "scene",
    [
        replace(WIDE, keys=(256, 5), values=(256, 3), heads=4),
        replace(WIDE, keys=(256, 2), values=(128, 3), page=8, dtype=torch.bfloat16, exact_dtype=torch.float32),
        replace(WIDE, head_dim=144, half_rope=36, keys=(144, 4), values=(288, 2), dtype=torch.float32),
        replace(WIDE, head_dim=66, half_rope=33, keys=(132, 3), values=(132, 1), heads=4),
        replace(WIDE, head_dim=80, half_rope=40, keys=(160, 6), values=(160, 3)),
    ],
    ids=str,
)
def test_coding_of_wide_sub_vectors(scene: Scene, transform: bool, rotated: bool) -> None:
    """Of a batch's rows some code many blocks, some one or none; the codes and all that lies beside them."""
    scene = replace(scene, past=(301, 17, 0, 40), new=(70, 9, 0, 133), transform=transform, rotated=rotated)
    stage = Stage(scene, DEVICE)
    _, after = stage.reference()
    tensors = stage.call()
    call = Call(stage.layer, tensors)
    call.workspace.fill_(0xFF)
    call.run("encode")
    got = stage.after(tensors)
    for name in ("key_codes", "value_codes"):
        assert torch.equal(getattr(got, name), getattr(after, name)), name
        assert intact(getattr(tensors, name)), f"{name}: something was written beside it"


@pytest.mark.parametrize("beam", [1, 3])
def test_close_calls_are_decided_exactly(beam: int) -> None:
    """Vectors beside the middle between two codewords, and codewords that occur twice: the lower code wins."""
    book = random_codebook(128, 64, 6, 7, transform=True)
    words = book.codewords.clone()
    words[:, 1, 200:] = words[:, 1, 40:96]
    book = Codebook(words, book.transform).to(DEVICE)
    layer = CudaLayer(2, 64, book, book, torch.ones(4, 0), torch.ones(4, 0), AttentionConfig(1.0, beam=beam), DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    pair = torch.randint(256, (2, 2000), generator=generator, device=DEVICE)
    first = book.codewords[:, 0].float()
    middle = (first[:, pair[0]] + first[:, pair[1]]) / 2
    for nudge in (1e-3, 1e-5, 1e-7):
        x = middle + nudge * torch.randn(middle.shape, generator=generator, device=DEVICE)
        x = x.transpose(0, 1).flatten(1).contiguous()
        assert torch.equal(layer.encode(x, "keys"), book.encode(x, beam)), nudge


def test_errors_reach_python() -> None:
    stage = Stage(DECODE, DEVICE)
    tensors = stage.call()
    with pytest.raises(GsrqError, match="query is on cpu, the layer on cuda:0"):
        Call(stage.layer, tensors._replace(query=tensors.query.cpu()))
    with pytest.raises(GsrqError, match="max_total is"):
        Call(stage.layer, tensors, 10**6)
    with pytest.raises(GsrqError, match=r"past_lengths is -1"):
        stage.layer.check_lengths(tensors._replace(past_lengths=tensors.past_lengths * 0 - 1))
    stage.layer.check_lengths(tensors)
    books = random_codebook(64, 64, 2)
    with pytest.raises(GsrqError, match="17 query heads a KV head"):
        CudaLayer(17, 64, books, books, torch.ones(2, 32), torch.ones(2, 32), AttentionConfig(1.0), DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    assert_clean(tool, Path(__file__).with_name("sanitized_calls.py"), "ran 14 calls")

"""gsrq::attention and gsrq::encode on the CPU: the checks, torch.compile, pages. tests/gpu has the kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, Case
from cuda_calls import TILE_CASES, by_head, call_tensors, layer_of_case, linear, paged

from gsrq_export import CacheRule, GsrqError
from gsrq_export.cache.reference import LayerCache, gsrq_attention
from gsrq_export.cuda import CallTensors, CudaLayer, ops
from gsrq_export.cuda.layer import layer_of

CASE = CASES[0]
ZEROS = torch.zeros(CASE.batch, dtype=torch.int64)
Change = Callable[[CallTensors], CallTensors]


def run(layer: CudaLayer, call: CallTensors, max_total: int | None = None) -> torch.Tensor:
    cache = LayerCache(call.key_codes, call.value_codes, call.key_exact, call.value_exact)
    return layer(*call[:5], cache, call.block_table, max_total)


def assert_equal(got: LayerCache, expected: LayerCache) -> None:
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(got, name), tensor), name


@pytest.mark.parametrize("page", [0, 1, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cache_is_updated_in_place_as_the_reference_says(case: Case, page: int) -> None:
    data = case.data()
    output, after = case.run(data)
    cache, table = paged(case.empty(), page) if page else (case.empty(), None)
    past = torch.zeros(case.batch, dtype=torch.int64)
    got = run(layer_of_case(case, data), call_tensors(data, past, data.lengths, cache, table))
    assert torch.equal(got, output)
    if table is not None:
        used = case.config.rule.coded(data.lengths)
        for b, n in enumerate(used.tolist()):
            for codes, expected in ((cache.key_codes, after.key_codes), (cache.value_codes, after.value_codes)):
                assert torch.equal(codes[table[b].long()].flatten(0, 1)[:n], expected[b, :n])
        cache = linear(cache, table, after.key_codes.shape[1])
        cache = LayerCache(after.key_codes, after.value_codes, cache.key_exact, cache.value_exact)
    assert_equal(cache, after)


@pytest.mark.parametrize("page", [0, 8, 24])
@pytest.mark.parametrize("tiled", [False, True], ids=["by token", "by head"])
@pytest.mark.parametrize("case", TILE_CASES, ids=str)
def test_either_order_of_codes_gives_the_same(case: Case, tiled: bool, page: int) -> None:
    """Prefilled, continued within a block and across blocks, decoded; the reference keeps its codes by token."""
    data, stored = case.data(), by_head(case) if tiled else case
    layer, expected = layer_of_case(stored, data), case.empty()
    capacity = expected.key_codes.shape[1]
    cache, table = paged(case.empty(), page) if page else (case.empty(), None)
    start = 0
    for steps in (19, 3, 11, *[1] * 4):
        rows = slice(start, start + steps)
        part = replace(data, **{n: getattr(data, n)[:, :, rows].contiguous() for n in ("query", "key", "value")})
        past, new = data.lengths.clamp(max=start), (data.lengths - start).clamp(0, steps)
        output, expected = gsrq_attention(
            part.query, part.key, part.value, data.cos, data.sin, past, new, expected,
            case.keys, case.values, case.config,
        )  # fmt: skip
        assert torch.equal(run(layer, call_tensors(part, past, new, cache, table)), output)
        start += steps
    assert start == case.steps
    found = cache if table is None else linear(cache, table, capacity)
    total, width = case.kv_heads * case.head_dim, max(case.keys.width, case.head_dim)
    assert torch.equal(found.key_codes, expected.key_codes) == (not tiled or width == total), "as the case says"
    found = stored.in_token_order(found)
    assert torch.equal(found.key_exact, expected.key_exact)
    assert torch.equal(found.value_exact, expected.value_exact)
    for b, n in enumerate(case.config.rule.coded(data.lengths).tolist()):
        assert torch.equal(found.key_codes[b, :n], expected.key_codes[b, :n])
        assert torch.equal(found.value_codes[b, :n], expected.value_codes[b, :n])


@pytest.mark.parametrize("page", [0, 12])
def test_codes_by_head_need_whole_tiles(page: int) -> None:
    """Capacity or page; nothing is written. By token the same tensors are taken."""
    case = TILE_CASES[0]
    data, cache = case.data(), case.empty()
    cache = LayerCache(
        cache.key_codes[:, :28].contiguous(), cache.value_codes[:, :28].contiguous(), *list(vars(cache).values())[2:]
    )
    cache, table = paged(cache, page) if page else (cache, None)
    before = LayerCache(*(tensor.clone() for tensor in vars(cache).values()))
    call = call_tensors(data, ZEROS, data.lengths, cache, table)
    with pytest.raises(GsrqError, match=f"key_codes has {page or 28} rows: .* tiles of 8 tokens") as error:
        run(layer_of_case(by_head(case), data), call)
    assert "multiple of 8" in error.value.mend
    assert_equal(cache, before)
    assert torch.equal(run(layer_of_case(case, data), call), case.run(data)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_calls_are_the_reference_on_the_rounded_tensors(dtype: torch.dtype) -> None:
    data = CASE.data()
    half = replace(data, query=data.query.to(dtype), key=data.key.to(dtype), value=data.value.to(dtype))
    wide = replace(data, query=half.query.float(), key=half.key.float(), value=half.value.float())
    output, after = CASE.run(wide)
    cache = CASE.empty()
    got = run(layer_of_case(CASE, data), call_tensors(half, ZEROS, data.lengths, cache))
    assert torch.equal(got, output.to(dtype))
    assert_equal(cache, after)


def test_pages_that_are_not_used_may_be_named_anything() -> None:
    data = CASE.data()
    cache, table = paged(CASE.empty(), 4)
    for b, total in enumerate(CASE.lengths):
        table[b, -(-CASE.config.rule.coded(total) // 4) :] = -7
    before = cache.key_codes.clone()
    got = run(layer_of_case(CASE, data), call_tensors(data, ZEROS, data.lengths, cache, table))
    assert torch.equal(got, CASE.run(data)[0])
    used = {int(entry) for entry in table.flatten() if entry >= 0}
    for page in set(range(before.shape[0])) - used:
        assert torch.equal(cache.key_codes[page], before[page])


def test_codes_of_vectors() -> None:
    case = replace(CASES[1])
    layer = layer_of_case(case, case.data())
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3)).half()
    for side, book in (("keys", case.keys), ("values", case.values)):
        assert torch.equal(layer.encode(x, side), book.encode(x, case.config.beam))
    with pytest.raises(GsrqError, match="side is 'both'"):
        layer.encode(x, "both")
    with pytest.raises(GsrqError, match=r"vectors are torch.float16 \[3, 5, 31\]"):
        layer.encode(x[..., :31], "keys")
    with pytest.raises(GsrqError, match=r"vectors are torch.float64"):
        layer.encode(x.double(), "keys")


def spoiled(**tensors: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda call: call._replace(**{name: change(getattr(call, name)) for name, change in tensors.items()})


def strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0]


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoiled(query=lambda x: x[0]), r"query has shape \[4, 37, 16\]"),
        (spoiled(query=torch.Tensor.double), "query is torch.float64"),
        (spoiled(query=torch.Tensor.half), "key is torch.float32"),
        (spoiled(query=lambda x: x[:, :3]), r"query has shape \[3, 3, 37, 16\], not \[3, 4, 37, 16\]"),
        (spoiled(key=lambda x: x[:, :, :5]), r"key has shape \[3, 2, 5, 16\]"),
        (spoiled(value=lambda x: x[..., :8]), r"value has shape"),
        (spoiled(past_lengths=torch.Tensor.int), "past_lengths is torch.int32"),
        (spoiled(new_lengths=lambda x: x[:2]), r"new_lengths has shape \[2\], not \[3\]"),
        (spoiled(key_exact=lambda x: x[:, :, :4]), r"key_exact has shape \[3, 2, 4, 16\], not \[3, 2, 11, 16\]"),
        (spoiled(value_exact=torch.Tensor.float), "value_exact is torch.float32"),
        (spoiled(key_codes=lambda x: x.view(torch.uint8)), "key_codes is torch.uint8"),
        (spoiled(key_codes=lambda x: x[..., :5]), r"key_codes has shape .* not \[3, any, 6\]"),
        (spoiled(value_codes=lambda x: x[:, 1:]), "value_codes has shape"),
        (spoiled(key_codes=strided), "key_codes has strides"),
        (spoiled(value_codes=shifted), "value_codes starts at address"),
        (spoiled(key_exact=shifted), "key_exact starts at address"),
        (spoiled(past_lengths=lambda x: x - 1), "row 0: past_lengths is -1"),
        (spoiled(new_lengths=lambda x: x + 1), "row 0: .* new_lengths 38 of 37 new tokens"),
        (spoiled(past_lengths=lambda x: x + 4), r"row 0: 4 \+ 37 tokens exceed 40"),
        (lambda call: call._replace(block_table=ZEROS[:, None]), "block_table is torch.int64"),
        (lambda call: call._replace(block_table=ZEROS.int()), r"block_table has shape \[3\], not \[3, any\]"),
        (lambda call: call._replace(block_table=torch.full((3, 1), 3, dtype=torch.int32)), "names page 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_written(change: Change, said: str) -> None:
    data = CASE.data()
    cache = CASE.empty()
    before = LayerCache(*(tensor.clone() for tensor in vars(cache).values()))
    call = change(call_tensors(data, ZEROS, data.lengths, cache))
    layer = layer_of_case(CASE, data)
    with pytest.raises(GsrqError, match=said) as error:
        torch.ops.gsrq.attention(*call, layer.handle, None)
    assert error.value.mend
    assert_equal(cache, before)


def test_tensors_elsewhere() -> None:
    data = CASE.data()
    call = call_tensors(data, ZEROS, data.lengths, CASE.empty())
    with pytest.raises(GsrqError, match="key_codes is on meta, the layer on cpu"):
        layer_of_case(CASE, data).check_lengths(call._replace(key_codes=call.key_codes.to("meta")))


def test_max_total() -> None:
    data = CASE.data()
    layer = layer_of_case(CASE, data)
    call = call_tensors(data, ZEROS, data.lengths, CASE.empty())
    with pytest.raises(GsrqError, match=r"row 0: 0 \+ 37 tokens exceed 36"):
        run(layer, call, 36)
    with pytest.raises(GsrqError, match=r"max_total is 41; .* hold 40 tokens"):  # 40 positions in the table
        run(layer, call, 41)
    small = call._replace(
        key_codes=call.key_codes[:, :9].contiguous(), value_codes=call.value_codes[:, :9].contiguous()
    )
    rule = CASE.config.rule
    assert rule.coded(18) == 8
    assert rule.coded(19) == 12
    with pytest.raises(GsrqError, match=r"max_total is 19; a cache with room for 9 coded tokens .* hold 18 tokens"):
        run(layer, small, 19)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"heads": 3}, "3 query heads on 2 KV heads"),
        ({"head_dim": 5}, "elements with head_dim 5"),
        ({"values": CASES[6].values}, "codebooks of 32 and 6 elements"),
        ({"cos": torch.ones(4, 9), "sin": torch.ones(4, 9)}, "rope_dim at most head_dim = 16"),
        ({"cos": torch.ones(4, 8)}, "cos"),
        ({"device": "meta"}, "device meta has no kernels"),
    ],
)
def test_layers_that_cannot_be(arguments: dict[str, object], said: str) -> None:
    data = CASE.data()
    good = {"heads": 4, "head_dim": 16, "keys": CASE.keys, "values": CASE.values, "cos": data.cos, "sin": data.sin}
    with pytest.raises(GsrqError, match=said):
        CudaLayer(**({**good, "config": CASE.config, "device": "cpu"} | arguments))  # type: ignore[arg-type]


def test_a_layer_lives_as_long_as_it_is_kept() -> None:
    layer = layer_of_case(CASE, CASE.data())
    handle = layer.handle
    assert layer_of(handle) is layer
    del layer
    gc.collect()
    with pytest.raises(GsrqError, match=f"layer {handle} is gone"):
        layer_of(handle)


def test_torch_compile_takes_a_decoding_loop_without_a_break() -> None:
    """Two layers, one compiled step, lengths that grow: compiled once, results and caches as eager."""
    data = CASE.data()
    layers = [layer_of_case(CASE, data), layer_of_case(CASES[5], data)]
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        nonlocal compiled
        compiled += 1
        assert sum("gsrq.attention" in str(node.target) for node in graph.graph.nodes) == len(layers)
        return graph.forward

    def step(x: CallTensors, caches: list[LayerCache]) -> torch.Tensor:
        query = x.query * 2
        for layer, cache in zip(layers, caches, strict=True):
            out = layer(query, x.key, x.value, x.past_lengths, x.new_lengths, cache)
            query = query + out.transpose(1, 2)
        return query

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        caches, rows = [CASE.empty(), CASES[5].empty()], []
        for t in range(24):
            one = [x[:, :, t : t + 1].contiguous() for x in (data.query, data.key, data.value)]
            call = CallTensors(
                *one, torch.full((3,), t), torch.ones(3, dtype=torch.int64), *vars(caches[0]).values(), None
            )
            rows.append(function(call, caches))
        results.append((torch.cat(rows, 2), caches))
    assert compiled == 1
    assert torch.equal(results[0][0], results[1][0])
    for eager, fast in zip(results[0][1], results[1][1], strict=True):
        assert_equal(fast, eager)


@pytest.mark.parametrize("page", [0, 4])
def test_the_operators_obey_torchs_rules(page: int) -> None:
    """Schema, mutation and shapes as torch checks them, under autograd-free tracing and with dynamic shapes."""
    data = CASE.data()
    layer = layer_of_case(CASE, data)
    cache, table = paged(CASE.empty(), page) if page else (CASE.empty(), None)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    call = call_tensors(data, ZEROS, data.lengths, cache, table)
    torch.library.opcheck(ops.attention, (*call, layer.handle, None), test_utils=tests)
    torch.library.opcheck(ops.encode, (torch.randn(7, 32), "keys", layer.handle), test_utils=tests)


def test_nothing_to_do() -> None:
    data = CASE.data()
    layer, cache = layer_of_case(CASE, data), CASE.empty()
    none = torch.zeros(3, dtype=torch.int64)
    out = run(layer, call_tensors(data, ZEROS, none, cache))
    assert out.shape == (3, 37, 4, 16)
    assert not out.any()
    empty = replace(data, query=data.query[:, :, :0], key=data.key[:, :, :0], value=data.value[:, :, :0])
    assert run(layer, call_tensors(empty, ZEROS, none, cache)).shape == (3, 0, 4, 16)
    assert_equal(cache, CASE.empty())
    assert layer.encode(torch.zeros(0, 32), "values").shape == (0, CASE.values.code_bytes)


def test_a_long_decode_over_pages_equals_one_prefill_where_that_is_coded() -> None:
    case = replace(CASE, config=replace(CASE.config, rule=CacheRule(1, 4, 3)))
    data = case.data()
    layer = layer_of_case(case, data)
    cache, table = paged(case.empty(), 2)
    rows = []
    for t in range(case.steps):
        part = replace(data, **{n: getattr(data, n)[:, :, t : t + 1].contiguous() for n in ("query", "key", "value")})
        new = (data.lengths > t).long()
        rows.append(run(layer, call_tensors(part, torch.clamp(data.lengths, max=t), new, cache, table)))
    expected, after = gsrq_attention(
        data.query, data.key, data.value, data.cos, data.sin, ZEROS, data.lengths, case.empty(),
        case.keys, case.values, case.config,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(rows, 1), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.key_exact, after.key_exact)
    assert torch.equal(cache.value_exact, after.value_exact)
    codes = linear(cache, table, after.key_codes.shape[1])
    for b, n in enumerate(case.config.rule.coded(data.lengths).tolist()):
        assert torch.equal(codes.key_codes[b, :n], after.key_codes[b, :n])
        assert torch.equal(codes.value_codes[b, :n], after.value_codes[b, :n])

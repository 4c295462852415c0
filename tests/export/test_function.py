"""The ONNX function of ai.gsrq::GsrqAttention, run by stock ONNX Runtime, against the torch oracle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from gsrq_export.cache.reference import AttentionConfig, LayerCache, attributes, gsrq_attention
from gsrq_export.cache.rule import CODE_TILE, CacheRule
from gsrq_export.codec.codebook import Codebook
from gsrq_export.export.function import (
    DOMAIN,
    INPUTS,
    KEY_CENTER,
    OPERATOR,
    OPERATOR_VERSION,
    OPSET,
    OUTPUTS,
    build_function,
)

POSITIONS = 300
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
}


@dataclass(frozen=True)
class Case:
    """One operator configuration and its codebooks."""

    config: AttentionConfig
    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    keys: Codebook
    values: Codebook
    capacity: int = 256
    dtype: torch.dtype = torch.float16

    def cache(self, batch: int) -> LayerCache:
        return LayerCache.empty(
            batch,
            self.capacity,
            self.kv_heads,
            self.head_dim,
            self.keys,
            self.values,
            self.config.rule,
            self.dtype,
        )

    def tokens(self, batch: int, steps: int, seed: int) -> list[torch.Tensor]:
        """Random query, key and value."""
        generator = torch.Generator().manual_seed(seed)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [torch.randn(batch, n, steps, self.head_dim, generator=generator) for n in counts]

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        frequency = 100.0 ** (-torch.arange(self.rope_dim // 2) / max(1, self.rope_dim // 2))
        angle = torch.arange(POSITIONS)[:, None] * frequency
        return angle.cos(), angle.sin()


def random_codebook(groups: int, stages: int, width: int, seed: int, metric: bool = True) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.7 ** torch.arange(stages)[None, :, None, None]
    words = (torch.randn(groups, stages, 256, width, generator=generator) * scale).half()
    transform = torch.eye(width).repeat(groups, 1, 1)
    if metric:
        transform = transform + 0.3 * torch.randn(groups, width, width, generator=generator)
    return Codebook(words, transform)


def centered(book: Codebook, seed: int = 7) -> Codebook:
    """The codebook as one of keys in the rotated frame."""
    total = book.groups * book.width
    return replace(book, center=torch.randn(total, generator=torch.Generator().manual_seed(seed)))


def case(seed: int = 0, **changes: object) -> Case:
    """Odd sizes; sub-vectors over two heads for keys and half a head for values."""
    base = Case(
        AttentionConfig(scale=0.3, rule=CacheRule(3, 5, 7), beam=3),
        heads=6,
        kv_heads=2,
        head_dim=12,
        rope_dim=8,
        keys=random_codebook(1, 5, 24, seed),
        values=random_codebook(4, 3, 6, seed + 1),
    )
    fields = {k: v for k, v in changes.items() if k in Case.__dataclass_fields__}
    config = {k: v for k, v in changes.items() if k in AttentionConfig.__dataclass_fields__}
    assert len(fields) + len(config) == len(changes)
    return replace(base, **fields, config=replace(base.config, **config))


class Node:
    """A model of this one operator, its inputs and outputs those of the graph, of any shape."""

    def __init__(self, c: Case, optimised: bool = True) -> None:
        self.case = c
        types = dict.fromkeys(INPUTS, TensorProto.FLOAT)
        types |= dict.fromkeys(("past_lengths", "new_lengths"), TensorProto.INT64)
        types |= dict.fromkeys(("key_codes", "value_codes"), TensorProto.INT8)
        types |= dict.fromkeys(("key_exact", "value_exact"), ONNX_TYPES[c.dtype])
        types |= dict.fromkeys(("key_codebooks", "value_codebooks"), TensorProto.FLOAT16)
        rotated = c.keys.center is not None
        types |= {KEY_CENTER: TensorProto.FLOAT} if rotated else {}
        inputs = tuple(types)
        out = {"output": TensorProto.FLOAT, **{f"present_{n}": types[n] for n in INPUTS[7:11]}}
        assert tuple(out) == OUTPUTS
        node = helper.make_node(OPERATOR, inputs, OUTPUTS, domain=DOMAIN, **attributes(c.config, rotated))
        function = build_function(rotated, c.config.codes_by_head)
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, t, [None] * rank(n)) for n, t in types.items()],
            [helper.make_tensor_value_info(n, t, [None] * rank(n)) for n, t in out.items()],
        )
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, OPERATOR_VERSION)]
        model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
        onnx.checker.check_model(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self.types = types | out

    def __call__(
        self, new: list[torch.Tensor], past_lengths: torch.Tensor, new_lengths: torch.Tensor, cache: LayerCache
    ) -> tuple[torch.Tensor, LayerCache]:
        c = self.case
        tensors = dict(
            zip(
                INPUTS,
                [
                    *new,
                    *c.tables,
                    past_lengths,
                    new_lengths,
                    *(cache.key_codes, cache.value_codes, cache.key_exact, cache.value_exact),
                    *(c.keys.codewords, c.values.codewords, c.keys.transform, c.values.transform),
                ],
                strict=True,
            )
        )
        if c.keys.center is not None:
            tensors[KEY_CENTER] = c.keys.center
        binding = self.session.io_binding()
        for name, tensor in tensors.items():
            binding.bind_ortvalue_input(name, to_ort(tensor))
        for name in OUTPUTS:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        output, *present = (from_ort(v, self.types[n]) for n, v in zip(OUTPUTS, binding.get_outputs(), strict=True))
        return output, LayerCache(*present)


def rank(name: str) -> int:
    if "lengths" in name or name == KEY_CENTER:
        return 1
    if name in ("cos", "sin"):
        return 2
    return 3 if name.endswith("codes") or name.endswith("transform") else 4


def to_ort(tensor: torch.Tensor) -> ort.OrtValue:
    """numpy has no bfloat16: its bits travel as uint16."""
    array = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(torch.int16).numpy().view(np.uint16), TensorProto.BFLOAT16
        )
    return ort.OrtValue.ortvalue_from_numpy(array.numpy())


def from_ort(value: ort.OrtValue, onnx_type: int) -> torch.Tensor:
    if onnx_type == TensorProto.BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy().copy())


def oracle(
    c: Case, new: list[torch.Tensor], past: torch.Tensor, new_lengths: torch.Tensor, cache: LayerCache
) -> tuple[torch.Tensor, LayerCache]:
    return gsrq_attention(*new, *c.tables, past, new_lengths, cache, c.keys, c.values, c.config)


def assert_same(got: tuple[torch.Tensor, LayerCache], expected: tuple[torch.Tensor, LayerCache]) -> None:
    for name in LayerCache.__dataclass_fields__:
        a, b = getattr(got[1], name), getattr(expected[1], name)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b), name
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)


VARIANTS = {
    "plain": {},
    "greedy": {"beam": 1},
    "interleaved, whole head": {"rope_interleaved": True, "rope_dim": 12},
    "exact prefill": {"exact_prefill": True},
    "softcap": {"softcap": 1.5},
    "sliding window": {"sliding_window": 19},
    "no window": {"rule": CacheRule(0, 0, 1)},
    "sinks only": {"rule": CacheRule(6, 0, 4), "exact_prefill": True},
    "float32 buffers": {"dtype": torch.float32},
    "bfloat16 buffers": {"dtype": torch.bfloat16},
    "rotated": {"keys": centered(random_codebook(1, 5, 24, 0))},
    "rotated, interleaved": {"keys": centered(random_codebook(4, 3, 6, 0)), "rope_interleaved": True},
    "rotated, exact prefill, whole head": {
        "keys": centered(random_codebook(2, 4, 12, 0)),
        "rope_dim": 12,
        "exact_prefill": True,
        "softcap": 1.5,
        "dtype": torch.bfloat16,
    },
    "by head, several sub-vectors a head": {
        "codes_by_head": True,
        "rule": CacheRule(3, 5, 8),
        "keys": random_codebook(6, 2, 4, 4),
    },
    "by head, sub-vectors of several heads": {
        "codes_by_head": True,
        "rule": CacheRule(0, 5, 16),
        "heads": 4,
        "kv_heads": 4,
        "keys": centered(random_codebook(4, 3, 12, 4)),
        "values": random_codebook(2, 3, 24, 5),
    },
    "one head": {
        "heads": 1,
        "kv_heads": 1,
        "keys": random_codebook(1, 4, 12, 8),
        "values": random_codebook(1, 4, 12, 9),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_oracle(name: str) -> None:
    """Batches of rows at different lengths: prefill, a ragged chunk, single tokens, idle rows."""
    c = case(**VARIANTS[name])
    node, cache, past = Node(c), c.cache(4), torch.zeros(4, dtype=torch.int64)
    for seed, new_lengths in enumerate([[31, 1, 0, 17], [2, 40, 9, 0], [1, 1, 1, 1], [1, 0, 1, 1], [53, 8, 27, 3]]):
        new = c.tokens(4, max(new_lengths), seed)
        lengths = torch.tensor(new_lengths)
        expected = oracle(c, new, past, lengths, cache)
        assert_same(node(new, past, lengths, cache), expected)
        cache, past = expected[1], past + lengths
    assert c.config.rule.coded(past).min() > 0


@pytest.mark.parametrize("seed", range(8))
def test_random_sizes(seed: int) -> None:
    random = np.random.default_rng(seed)
    kv_heads, group, half = (int(random.integers(1, 4)) for _ in range(3))
    head_dim = 2 * half + int(random.integers(0, 5))
    books = []
    for side in range(2):
        groups = [kv_heads, 1, kv_heads * head_dim][int(random.integers(3))]
        stages = int(random.integers(1, 6))
        books.append(random_codebook(groups, stages, kv_heads * head_dim // groups, seed + side))
    if seed % 2:
        books[0] = centered(books[0])
    rule = CacheRule(*(int(random.integers(low, 9)) for low in (0, 0, 1)))
    by_head = seed % 4 > 1
    c = case(
        rule=replace(rule, block=CODE_TILE) if by_head else rule,
        codes_by_head=by_head,
        beam=int(random.integers(1, 5)),
        rope_interleaved=bool(random.integers(2)),
        exact_prefill=bool(random.integers(2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_dim=2 * half,
        keys=books[0],
        values=books[1],
    )
    batch = int(random.integers(1, 5))
    node, cache, past = Node(c), c.cache(batch), torch.zeros(batch, dtype=torch.int64)
    for call in range(6):
        steps = int(random.integers(1, 40))
        lengths = torch.from_numpy(random.integers(0, steps + 1, batch))
        new = c.tokens(batch, steps, 100 * seed + call)
        expected = oracle(c, new, past, lengths, cache)
        assert_same(node(new, past, lengths, cache), expected)
        cache, past = expected[1], past + lengths


def test_graph_optimisers_change_nothing() -> None:
    c = case()
    new, past, lengths = c.tokens(2, 40, 0), torch.tensor([0, 0]), torch.tensor([40, 5])
    plain = Node(c, optimised=False)(new, past, lengths, c.cache(2))
    assert_same(plain, oracle(c, new, past, lengths, c.cache(2)))
    assert_same(Node(c)(new, past, lengths, c.cache(2)), plain)


def test_beam_as_wide_as_a_codebook() -> None:
    c = case(beam=256, keys=random_codebook(1, 3, 24, 5), values=random_codebook(1, 2, 24, 6))
    new, past, lengths = c.tokens(1, 23, 0), torch.tensor([0]), torch.tensor([23])
    assert_same(Node(c)(new, past, lengths, c.cache(1)), oracle(c, new, past, lengths, c.cache(1)))


def test_ties_go_to_the_lower_path_and_code() -> None:
    """Small integers: sums are exact and whole families of codewords are equally good."""
    generator = torch.Generator().manual_seed(3)

    def book(groups: int, stages: int, width: int) -> Codebook:
        words = torch.randint(-1, 2, (groups, stages, 256, width), generator=generator).half()
        return Codebook(words, torch.eye(width).repeat(groups, 1, 1))

    c = case(keys=book(12, 3, 2), values=book(4, 4, 6), beam=4)
    new = [torch.randint(-3, 4, x.shape, generator=generator).float() for x in c.tokens(2, 60, 0)]
    past, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([60, 41])
    assert_same(Node(c)(new, past, lengths, c.cache(2)), oracle(c, new, past, lengths, c.cache(2)))


@pytest.mark.parametrize("name", ["plain", "rotated", "by head, several sub-vectors a head"])
def test_empty_cache_storage(name: str) -> None:
    """Capacity 0 serves until the first block is due, and then fails."""
    c = case(**{"capacity": 0, **VARIANTS[name]})
    node, none = Node(c), torch.zeros(1, dtype=torch.int64)
    limit = c.config.rule.sinks + c.config.rule.window + c.config.rule.block
    for steps in (1, limit - 1):
        new = c.tokens(1, steps, 0)
        lengths = torch.tensor([steps])
        assert_same(node(new, none, lengths, c.cache(1)), oracle(c, new, none, lengths, c.cache(1)))
    with pytest.raises(Exception, match="indices element out of data bounds"):
        node(c.tokens(1, limit, 0), none, torch.tensor([limit]), c.cache(1))


@pytest.mark.parametrize("coded", [True, False])
def test_chunks_equal_one_shot(coded: bool) -> None:
    """Coded prefill: one shot, chunks and single tokens agree; codes do so with exact prefill too."""
    c = case(exact_prefill=not coded)
    node, steps = Node(c), 47
    new = c.tokens(1, steps, 1)
    whole, end = node(new, torch.tensor([0]), torch.tensor([steps]), c.cache(1))
    for chunks in ([steps - 30, 22, 8], [1] * steps):
        cache, outputs, start = c.cache(1), [], 0
        for size in chunks:
            part = [x[:, :, start : start + size] for x in new]
            output, cache = node(part, torch.tensor([start]), torch.tensor([size]), cache)
            outputs.append(output)
            start += size
        for name in LayerCache.__dataclass_fields__:
            assert torch.equal(getattr(cache, name), getattr(end, name)), name
        close = torch.allclose(torch.cat(outputs, 1), whole, atol=1e-5)
        assert close is coded


def test_causality() -> None:
    """Later tokens change nothing of earlier outputs."""
    c = case()
    node, steps, cut = Node(c), 50, 29
    new, other = c.tokens(1, steps, 1), c.tokens(1, steps, 2)
    changed = [torch.cat([a[:, :, :cut], b[:, :, cut:]], 2) for a, b in zip(new, other, strict=True)]
    first, second = (node(x, torch.tensor([0]), torch.tensor([steps]), c.cache(1))[0] for x in (new, changed))
    torch.testing.assert_close(first[:, :cut], second[:, :cut], atol=1e-6, rtol=0)
    assert (first[:, cut:] - second[:, cut:]).abs().amax() > 1e-2


def test_padding_is_ignored() -> None:
    """Neither the padding of the batch, nor unwritten slots, nor the other rows reach a row's result."""
    c = case()
    node, lengths = Node(c), torch.tensor([38, 5, 0])
    new, past = c.tokens(3, 38, 1), torch.zeros(3, dtype=torch.int64)
    dirty = c.cache(3)
    for x in (dirty.key_exact, dirty.value_exact):
        x.normal_()
    for x in (dirty.key_codes, dirty.value_codes):
        x.random_(-128, 128)
    output, after = node(new, past, lengths, dirty)
    for b, n in enumerate(lengths.tolist()):
        assert (output[b, n:] == 0).all()
        if n:
            alone = node([x[b : b + 1, :, :n] for x in new], past[:1], lengths[b : b + 1], c.cache(1))
            torch.testing.assert_close(output[b : b + 1, :n], alone[0], atol=1e-6, rtol=0)
            coded = c.config.rule.coded(n)
            assert torch.equal(after.key_codes[b, :coded], alone[1].key_codes[0, :coded])
    assert torch.equal(after.key_exact[2], dirty.key_exact[2])
    assert torch.equal(after.value_codes[2], dirty.value_codes[2])


@pytest.mark.parametrize(
    ("past", "new", "steps"),
    [
        ([0, 0], [3, 9], 8),
        ([0, 5], [3, -1], 8),
        ([0, -4], [3, 8], 8),
        ([0, POSITIONS - 7], [3, 8], 8),
        ([0, POSITIONS + 1], [1, 0], 1),
        ([0, 256 + 15], [3, 8], 8),
    ],
    ids=["new > T", "new < 0", "past < 0", "positions", "positions, idle row", "capacity"],
)
def test_impossible_lengths_fail(past: list[int], new: list[int], steps: int) -> None:
    c = case()
    with pytest.raises(Exception, match="indices element out of data bounds"):
        Node(c)(c.tokens(2, steps, 0), torch.tensor(past), torch.tensor(new), c.cache(2))


@pytest.mark.parametrize("capacity", [5, 20])
def test_a_capacity_that_no_tiles_fill_fails(capacity: int) -> None:
    c = case(capacity=capacity, **VARIANTS["by head, several sub-vectors a head"])
    with pytest.raises(Exception, match="Reshape"):
        Node(c)(c.tokens(1, 3, 0), torch.tensor([0]), torch.tensor([3]), c.cache(1))


def test_only_standard_operators_and_deterministic() -> None:
    for kind in itertools.product((False, True), repeat=2):
        function = build_function(*kind)
        assert function.SerializeToString() == build_function(*kind).SerializeToString()
        assert [(o.domain, o.version) for o in function.opset_import] == [("", OPSET)]
        assert {n.domain for n in function.node} == {""}

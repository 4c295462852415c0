"""The TensorRT plugin's enqueue on a GPU against the reference, called as a context of TensorRT would call it."""

from __future__ import annotations

import pytest
import torch
import trt_harness
from attention_cases import BY_HEAD, CASES, ROTATED, Case, Data
from op_tensors import CACHE, FEEDS, assert_close, assert_same, feeds
from trt_harness import Desc, Harness, Plugin, descs, input_tensors

from gsrq_export import native
from gsrq_export.cache.reference import LayerCache, attributes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.find(native.CUDA) is None, reason="no CUDA library is built: gsrq plugins build --cuda"),
]

PLAIN = CASES[0]
WIDE = Case("wide", PLAIN.config, heads=8, head_dim=64, rope_dim=64, key_width=64, key_stages=5, value_width=64)
TURNED = Case("wide, rotated", PLAIN.config, 8, 2, 64, rope_dim=64, key_width=64, value_width=64, rotated=True)
GUARD = 4096


@pytest.fixture(params=[10, 11])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setenv(native.CUDA.variable, str(native.find(native.CUDA)))
    return trt_harness.harness(request.param)


class Runner:
    """A plugin of a plan that was built for calls of up to all the case's steps, its constants on the GPU."""

    def __init__(self, host: Harness, case: Case, data: Data, io: torch.dtype = torch.float32) -> None:
        self.host, self.case = host, case
        built = host.create(attributes(case.config, case.rotated))
        assert built is not None, host.messages()
        cache = vars(case.empty())
        largest = input_tensors(case, feeds(data, 0, case.steps, io), cache)
        inputs, outputs = descs(largest)
        assert built.configure(inputs, outputs) == 0, host.messages()
        self.bytes = built.workspace(inputs, outputs)
        assert self.bytes > 0, host.messages()
        self.workspace = torch.full((self.bytes + GUARD,), 0xFF, dtype=torch.uint8, device="cuda")
        self.plugin = built.another("reload").another("attach")
        self.constants = {i: t.cuda() for i, t in enumerate(largest) if i in (3, 4) or i >= 11}

    def inputs(self, tensors: dict[str, torch.Tensor], cache: LayerCache) -> list[torch.Tensor]:
        given = input_tensors(self.case, tensors, vars(cache))
        return [self.constants.get(i, t.cuda()) for i, t in enumerate(given)]

    def outputs(self, inputs: list[torch.Tensor], in_place: bool) -> list[torch.Tensor]:
        """Aliased outputs as their inputs, or as memory of their own; filled with what must not stay."""
        made = [torch.full(shape, 111, dtype=dtype, device="cuda") for dtype, shape in descs(inputs)[1]]
        return [made[0], *(inputs[7:11] if in_place else made[1:])]

    def enqueue(
        self, inputs: list[torch.Tensor], outputs: list[torch.Tensor], plugin: Plugin | None = None, first: bool = True
    ) -> int:
        plugin, stream = plugin or self.plugin, torch.cuda.current_stream().cuda_stream
        described: tuple[list[Desc], list[Desc]] = descs(inputs)
        assert not first or plugin.shape_change(*described) == 0, self.host.messages()
        return plugin.enqueue(inputs, outputs, self.workspace, stream)

    def run(
        self, tensors: dict[str, torch.Tensor], cache: LayerCache, in_place: bool = True
    ) -> tuple[torch.Tensor, LayerCache]:
        inputs = self.inputs(tensors, cache)
        before = [t.clone() for t in inputs[7:11]]
        outputs = self.outputs(inputs, in_place)
        assert self.enqueue(inputs, outputs) == 0, self.host.messages()
        torch.cuda.synchronize()
        assert bool((self.workspace[self.bytes :] == 0xFF).all()), "written past the workspace"
        if not in_place:
            assert all(torch.equal(a, b) for a, b in zip(before, inputs[7:11], strict=True)), "inputs were written"
        output, *after = (t.cpu() for t in outputs)
        return output, LayerCache(*after)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copied"])
@pytest.mark.parametrize("chunk", [37, 10, 1])
@pytest.mark.parametrize("case", [*CASES, *ROTATED, *BY_HEAD, WIDE, TURNED], ids=str)
def test_the_shared_cases(host: Harness, case: Case, chunk: int, in_place: bool) -> None:
    if case.config.exact_prefill and chunk != case.steps:
        pytest.skip("what exact prefill shows depends on the parts")
    data = case.data()
    expected, after = case.run(data)
    runner, cache, parts = Runner(host, case, data), case.empty(), []
    for start in range(0, case.steps, chunk):
        output, cache = runner.run(feeds(data, start, min(start + chunk, case.steps)), cache, in_place)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_same(cache, after)


@pytest.mark.parametrize("io", [torch.float16, torch.bfloat16])
def test_sixteen_bit_queries(host: Harness, io: torch.dtype) -> None:
    case = Case("wide", WIDE.config, 8, 2, 64, rope_dim=64, key_width=64, value_width=64, exact_dtype=io)
    data = case.data()
    rounded = Data(*(x.to(io).float() for x in (data.query, data.key, data.value)), data.cos, data.sin, data.lengths)
    expected, after = case.run(rounded)
    output, cache = Runner(host, case, data, io).run(feeds(data, 0, case.steps, io), case.empty())
    assert float((output.float() - expected).norm() / expected.norm()) < 3e-3
    assert_same(cache, after)


@pytest.mark.parametrize(
    ("row", "past", "new"), [(0, -1, 1), (2, 40, 1), (1, 0, 2), (0, 0, -1), (1, 2**62, 1), (1, -(2**63), 1)]
)
def test_a_row_with_impossible_lengths_is_not_touched_and_not_answered(
    host: Harness, row: int, past: int, new: int
) -> None:
    """The lengths lie on the GPU, where nobody can raise an error; the other rows go on."""
    data = WIDE.data()
    runner = Runner(host, WIDE, data)
    _, cache = runner.run(feeds(data, 0, 20), WIDE.empty())
    tensors = feeds(data, 20, 21) | {"past_lengths": torch.tensor([20, 0, 20]), "new_lengths": torch.ones(3).long()}
    right, expected = runner.run(tensors, cache)
    tensors["past_lengths"] = tensors["past_lengths"].index_fill(0, torch.tensor(row), past)
    tensors["new_lengths"] = tensors["new_lengths"].index_fill(0, torch.tensor(row), new)
    output, after = runner.run(tensors, cache)
    assert bool(output[row].isnan().all())
    others = [b for b in range(3) if b != row]
    assert_close(output[others], right[others], 1e-5)  # work is divided anew among the rows
    for name in CACHE:
        assert torch.equal(getattr(after, name)[others], getattr(expected, name)[others]), name
        assert torch.equal(getattr(after, name)[row], getattr(cache, name)[row]), name


def test_contexts_of_a_plan_share_what_is_derived_from_the_codebooks(host: Harness) -> None:
    data = WIDE.data()
    expected, after = WIDE.run(data)
    runner = Runner(host, WIDE, data)
    plan = runner.plugin.another("reload")
    contexts = [plan.another("attach") for _ in range(3)]
    tensors = feeds(data, 0, WIDE.steps)
    used = []
    for context in contexts:
        inputs = runner.inputs(tensors, WIDE.empty())
        outputs = runner.outputs(inputs, True)
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        assert runner.enqueue(inputs, outputs, context) == 0, host.messages()
        torch.cuda.synchronize()
        used.append(free - torch.cuda.mem_get_info()[0])
        assert_close(outputs[0].cpu(), expected)
        assert_same(LayerCache(*(x.cpu() for x in outputs[1:])), after)
    assert used[1:] == [0, 0]


def test_a_captured_step_reads_its_lengths_anew(host: Harness) -> None:
    data = WIDE.data()
    expected, after = WIDE.run(data)
    runner = Runner(host, WIDE, data)
    inputs = runner.inputs(feeds(data, 0, 1), WIDE.empty())
    outputs = runner.outputs(inputs, True)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        failed = runner.enqueue(inputs, outputs)
        graph.capture_end()
        assert failed != 0
        assert "run one before capturing a graph" in host.messages()
        assert runner.enqueue(inputs, outputs) == 0, host.messages()
        stream.synchronize()
        for tensor in inputs[7:11]:
            tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        assert runner.enqueue(inputs, outputs, first=False) == 0, host.messages()
        graph.capture_end()
        parts = []
        for t in range(WIDE.steps):
            for name, tensor in feeds(data, t, t + 1).items():
                if name not in ("cos", "sin"):
                    inputs[FEEDS.index(name)].copy_(tensor)
            graph.replay()
            stream.synchronize()
            parts.append(outputs[0].cpu())
    assert_close(torch.cat(parts, 1), expected)
    assert_same(LayerCache(*(x.cpu() for x in outputs[1:])), after)

"""The operator in ONNX Runtime on CUDA against the reference, and a whole model on CUDA against the CPU."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnxruntime as ort
import pytest
import torch
from attention_cases import BY_HEAD, CASES, ROTATED, Case, Data
from op_session import ONNX_TYPE, OpSession
from op_tensors import CACHE, assert_close, assert_same, feeds
from tiny_artifact import tiny_artifact

from gsrq_export import native
from gsrq_export.cache.reference import LayerCache
from gsrq_export.runtime.session import CUDA, OrtModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
    pytest.mark.skipif(
        native.find(native.ORT_CUDA) is None, reason="no CUDA library is built: gsrq plugins build --cuda"
    ),
]

DECODE = next(case for case in CASES if case.name == "plain")
WIDE = Case("wide", DECODE.config, heads=8, head_dim=64, rope_dim=64, key_width=64, key_stages=5, value_width=64)


def session(case: Case, data: Data, io: torch.dtype = torch.float32, tables: bool = True, **more: object) -> OpSession:
    ort.preload_dlls()
    library = native.find(native.ORT_CUDA)
    assert library is not None
    kept = (data.cos, data.sin) if tables else None
    return OpSession(
        library, case.keys, case.values, case.config, case.exact_dtype, provider=CUDA, io=io, tables=kept, **more
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("chunk", [37, 10, 1])
@pytest.mark.parametrize("case", [*CASES, *ROTATED, *BY_HEAD, WIDE], ids=str)
def test_the_shared_cases(case: Case, chunk: int, tables: bool) -> None:
    if case.config.exact_prefill and chunk != case.steps:
        pytest.skip("what exact prefill shows depends on the parts")
    data = case.data()
    expected, after = case.run(data)
    runner, cache, parts = session(case, data, tables=tables), case.empty(), []
    for start in range(0, case.steps, chunk):
        output, cache = runner.run(feeds(data, start, start + chunk), cache)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_same(cache, after)


@pytest.mark.parametrize("io", [torch.float16, torch.bfloat16])
def test_sixteen_bit_queries(io: torch.dtype) -> None:
    case = Case("wide", WIDE.config, 8, 2, 64, rope_dim=64, key_width=64, value_width=64, exact_dtype=io)
    data = case.data()
    rounded = Data(*(x.to(io).float() for x in (data.query, data.key, data.value)), data.cos, data.sin, data.lengths)
    expected, after = case.run(rounded)
    output, cache = session(case, data, io).run(feeds(data, 0, case.steps, io), case.empty())
    assert float((output.float() - expected).norm() / expected.norm()) < 2e-3
    assert_same(cache, after)


def bound(runner: OpSession, tensors: dict[str, torch.Tensor], cache: LayerCache) -> ort.IOBinding:
    """The caches as tensors on the GPU, each input and output; the lengths on the CPU."""
    binding = runner.session.io_binding()
    for name in runner.feeds:
        binding.bind_cpu_input(name, tensors[name].numpy())
    for name in CACHE:
        tensor = getattr(cache, name)
        place = ("cuda", 0, ONNX_TYPE[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        binding.bind_input(name, *place)
        binding.bind_output(f"present_{name}", *place)
    binding.bind_output("output", "cpu")
    return binding


def test_bound_caches_are_updated_in_place() -> None:
    data = WIDE.data()
    expected, after = WIDE.run(data)
    runner, parts = session(WIDE, data), []
    cache = LayerCache(*(x.cuda() for x in vars(WIDE.empty()).values()))
    torch.cuda.synchronize()
    for t in range(WIDE.steps):
        binding = bound(runner, feeds(data, t, t + 1), cache)
        runner.session.run_with_iobinding(binding)
        parts.append(torch.from_numpy(binding.get_outputs()[-1].numpy()))
    assert_close(torch.cat(parts, 1), expected)
    assert_same(LayerCache(*(x.cpu() for x in vars(cache).values())), after)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"past_lengths": torch.tensor([-1, 0, 0])}, "past_lengths[0] is -1"),
        ({"new_lengths": torch.tensor([1, 2, 0])}, "new_lengths[1] is 2, must be 0 to 1"),
        ({"past_lengths": torch.tensor([0, 0, 40])}, "row 2: 41 tokens exceed the rotary table's 40 positions"),
    ],
)
def test_impossible_lengths_are_refused_before_anything_is_written(change: dict[str, torch.Tensor], said: str) -> None:
    data = WIDE.data()
    tensors = feeds(data, 0, 1) | {"new_lengths": torch.ones(3, dtype=torch.int64)} | change
    cache = LayerCache(*(x.cuda() for x in vars(WIDE.empty()).values()))
    torch.cuda.synchronize()
    runner = session(WIDE, data)
    with pytest.raises(Exception, match=re.escape(said)):
        runner.session.run_with_iobinding(bound(runner, tensors, cache))
    assert_same(LayerCache(*(x.cpu() for x in vars(cache).values())), WIDE.empty())


def run_with(limit: int) -> str:
    """What a session says to one call, with so many bytes of GPU memory; "" where it ran."""
    case = Case("many rows", DECODE.config, heads=8, head_dim=64, rope_dim=64, steps=192, lengths=(192,) * 48)
    data = case.data()
    options = {"gpu_mem_limit": str(limit), "arena_extend_strategy": "kSameAsRequested"}
    try:
        session(case, data, provider_options=options).run(feeds(data, 0, case.steps), case.empty())
    except Exception as error:  # whatever ONNX Runtime raises
        return str(error) or repr(error)
    return ""


def test_memory_that_is_out_is_an_error() -> None:
    """In a process of its own, which must live. Between too little and enough, what is missing is what is asked for
    last: the call's workspace."""
    low, high, said = 2**20, 2**30, []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(run_with, high).result() == ""
        while high - low > 2**16:
            middle = (low + high) // 2
            answer = pool.submit(run_with, middle).result()
            low, high = (middle, high) if answer else (low, middle)
            said.append(answer)
    assert all("memory" in answer.lower() for answer in said if answer), said
    assert "GsrqAttention" in next(answer for answer in reversed(said) if answer), said


def test_codebooks_must_be_initializers() -> None:
    with pytest.raises(Exception, match="inputs 11 to 14"):
        session(WIDE, WIDE.data(), constant=False)


@pytest.mark.parametrize("library", ["auto", None])
def test_a_model_on_cuda_agrees_with_the_cpu(library: str | None) -> None:
    artifact = tiny_artifact()
    on_cpu = OrtModel(artifact.path, threads=2, library=None)
    on_cuda = OrtModel(artifact.path, library=library, provider=CUDA)  # type: ignore[arg-type]
    assert on_cuda.backend == ("cuda-op" if library else "onnx-function")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 97, n).tolist() for n in (60, 1, 33)]

    def close(got: np.ndarray, expected: np.ndarray) -> bool:  # type: ignore[type-arg]
        return float(np.linalg.norm(got - expected)) < 4e-3 * float(np.linalg.norm(expected))

    assert close(on_cuda.prefill(prompts), on_cpu.prefill(prompts))
    for _ in range(20):
        tokens = generator.integers(3, 97, 3).tolist()
        assert close(on_cuda.step(tokens), on_cpu.step(tokens))
    assert on_cuda.lengths.tolist() == [80, 21, 53]
    for part in ("key_codes", "value_codes"):
        same = on_cuda.read_cache(0, part) == on_cpu.read_cache(0, part)
        assert same.mean() > 0.99, part

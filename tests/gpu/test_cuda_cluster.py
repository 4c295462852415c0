"""Clustering on the CUDA kernels against float64 and against torch's way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sanitizer import TOOLS, assert_clean

from gsrq_export import GsrqError, native
from gsrq_export.codec import fused
from gsrq_export.codec.cluster import nearest, sum_rows
from gsrq_export.codec.refit import encode_rows, refit
from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.cuda.cluster import FORMS, assign, update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.find(native.CUDA) is None, reason="no CUDA library is built: gsrq plugins build --cuda"),
]

DEVICE = "cuda"
SHAPES = [(1, 1, 1), (1, 999, 3), (3, 54, 16), (2, 257, 31), (2, 4097, 48), (3, 1025, 64), (1, 20011, 96)]
SHAPES += [(8, 5003, 128), (2, 3001, 130), (1, 2999, 200), (2, 1500, 256), (1, 700, 384), (2, 333, 512), (1, 100, 509)]
CLOSE = 5e-6  # of what the terms of a score add up to: nearer scores than that float32 cannot tell apart


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def data(groups: int, rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, codewords of which some are rows, some tiny and one is zero, and weights of which some are zero."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(groups, rows, width, generator=g, device=DEVICE)
    x = x * torch.exp(0.5 * torch.randn(groups, 1, width, generator=g, device=DEVICE))
    words = 0.2 * torch.randn(groups, 256, width, generator=g, device=DEVICE)
    words[:, ::3] += 0.5 * x[:, torch.arange(0, 256, 3, device=DEVICE) % rows]
    words[:, 5] = 0
    words[:, 7] *= 1e-2
    x[:, 0] = 0
    x[:, rows // 2] *= 1e4
    weights = torch.rand(groups, rows, generator=g, device=DEVICE)
    weights[:, ::7] = 0
    return x, words, weights


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_assignment(shape: tuple[int, int, int], inner: bool) -> None:
    x, words, weights = data(*shape)
    products = x.double() @ words.double().transpose(1, 2)
    squares = (words.double() ** 2).sum(2)[:, None]
    scores = products if inner else 2 * products - squares
    size = 2 * x.double().norm(dim=2)[..., None] * words.double().norm(dim=2)[:, None] + squares
    best, expected = scores.max(2)
    codes, gains, inertia = assign(x, words, weights, inner)
    chosen = codes.long()[..., None]
    behind = (best - scores.gather(2, chosen)[..., 0]) / size.amax(2).clamp(min=1e-30)
    assert float(behind.max()) < CLOSE
    runner_up = scores.scatter(2, expected[..., None], float("-inf")).amax(2)
    clear = best - runner_up > CLOSE * size.amax(2)
    assert clear.double().mean() > 0.9 or shape[2] < 16
    assert torch.equal(codes.long()[clear], expected[clear])
    assert float(((gains - best).abs() / size.amax(2).clamp(min=1e-30)).max()) < CLOSE
    torch.testing.assert_close(inertia, (weights * gains).sum(1, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    bare = assign(x, words, inner=inner)
    assert torch.equal(bare.codes, codes)
    torch.testing.assert_close(bare.inertia, gains.sum(1, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_equals_take_the_lowest_code() -> None:
    x, words, _ = data(2, 3001, 128)
    words[:, 64:128] = words[:, :64]
    words[:, 128:] = words[:, :128]
    assert int(assign(x, words).codes.max()) < 64


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_any_scale(scale: float) -> None:
    x, words, _ = data(2, 1001, 64)
    first, other = assign(x, words), assign(x * scale, words * scale)
    assert (first.codes == other.codes).double().mean() > 0.999
    torch.testing.assert_close(other.gains / scale / scale, first.gains, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("skew", ["even", "empty", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(shape: tuple[int, int, int], skew: str, form: str) -> None:
    x, words, weights = data(*shape, seed=1)
    groups, rows, _ = shape
    g = torch.Generator(DEVICE).manual_seed(2)
    codes = torch.randint(256, (groups, rows), generator=g, device=DEVICE, dtype=torch.uint8)
    if skew == "empty":
        codes = codes // 3 * 3
    if skew == "one":
        codes[:, rows // 3 :] = 255
    norms = x.norm(dim=2)
    found = update(x, codes, form, weights, norms, words)  # type: ignore[arg-type]
    exact = (t.double().cpu() for t in (weights, norms, words))
    expected = update(x.double().cpu().float(), codes.cpu(), form, *(t.float() for t in exact))  # type: ignore[arg-type]
    torch.testing.assert_close(found.totals.cpu(), expected.totals, rtol=1e-5, atol=1e-6)
    size = float(expected.words.abs().max())
    torch.testing.assert_close(found.words.cpu(), expected.words, rtol=1e-4, atol=2e-6 * size)
    assert not found.words[found.totals == 0].any()
    bare = update(x, codes, "sums")
    counts = torch.stack([torch.bincount(c.long(), minlength=256) for c in codes])
    assert torch.equal(bare.totals, counts.float())
    double = torch.zeros(groups, 256, shape[2], dtype=torch.float64, device=DEVICE)
    double.scatter_add_(1, codes.long()[..., None].expand_as(x), x.double())
    torch.testing.assert_close(bare.words.double(), double, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


def test_a_vanishing_direction_keeps_the_old_one() -> None:
    x = torch.randn(1, 600, 32, device=DEVICE)
    x[0, 300:] = -x[0, :300]
    words = torch.randn(1, 256, 32, device=DEVICE)
    codes = torch.zeros(1, 600, dtype=torch.uint8, device=DEVICE)
    found = update(x, codes, "gain-shape", None, x.norm(dim=2), words).words
    assert torch.isfinite(found).all()
    assert float(found[0, 0].norm()) < 1e-4


def test_the_same_bits_run_to_run_and_of_one_group_or_many() -> None:
    x, words, weights = data(8, 20011, 128)
    norms = x.norm(dim=2)
    runs = []
    for _ in range(3):
        found = assign(x, words, weights)
        runs.append((*found, *update(x, found.codes, "gain-shape", weights, norms, words)))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
    alone = assign(x[3:4], words[3:4], weights[3:4])
    fresh = update(x[3:4], alone.codes, "gain-shape", weights[3:4], norms[3:4], words[3:4])
    for a, b in zip(runs[0], (*alone, *fresh), strict=True):
        assert torch.equal(a[3:4], b)


def test_neither_step_keeps_a_matrix_of_rows_by_codewords() -> None:
    x, words, weights = data(2, 100_003, 128)
    norms = x.norm(dim=2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = assign(x, words, weights)
    update(x, found.codes, "gain-shape", weights, norms, words)
    assert torch.cuda.max_memory_allocated() - before < x.shape[0] * x.shape[1] * 256  # one byte an entry


def test_both_steps_can_be_captured() -> None:
    x, words, weights = data(2, 5003, 64)
    norms = x.norm(dim=2)

    def step() -> list[torch.Tensor]:
        found = assign(x, words, weights)
        return [*found, *update(x, found.codes, "gain-shape", weights, norms, words)]

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["gskm", "kmeans", "kmeans-spherical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_training_codes_as_well_as_torch_and_repeats_to_the_bit(method: str, weighted: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20001, 144, generator=g)
    x[:, 48:96] = x[torch.arange(20001) % 40, 48:96]  # 40 different vectors: empty clusters
    x = x.cuda()
    weights = torch.rand(20001, 3, generator=g) if weighted else None
    transform = torch.eye(48) + 0.05 * torch.randn(3, 48, 48, generator=g)
    training = Training(method, 5)  # type: ignore[arg-type]
    counted: list[int] = []
    first, log = train_codebook(x, weights, 48, 4, training, transform, counted.append)
    assert sum(counted) == 12
    again, _ = train_codebook(x, weights, 48, 4, training, transform)
    assert torch.equal(first.codewords, again.codewords)
    with fused.torch_alone():
        _, other = train_codebook(x, weights, 48, 4, training, transform)
    assert log.train == pytest.approx(other.train, rel=0.02)
    assert log.held_out == pytest.approx(other.held_out, rel=0.02)
    assert log.usage == pytest.approx(other.usage, abs=0.06)  # equal vectors may share a codeword or not


def test_the_first_stage_takes_the_path_that_torch_takes() -> None:
    """One iteration from the same seeds: codewords are equal but for rounding and single close calls."""
    x = torch.randn(30011, 64, generator=torch.Generator().manual_seed(3)).cuda()
    for method in ("gskm", "kmeans", "kmeans-spherical"):
        training = Training(method, 1)  # type: ignore[arg-type]
        found, _ = train_codebook(x, None, 64, 1, training)
        with fused.torch_alone():
            other, _ = train_codebook(x, None, 64, 1, training)
        off = (found.codewords - other.codewords).float().norm(dim=3) / other.codewords.float().norm(dim=3)
        assert float(off.median()) < 1e-3, method
        assert float(off.mean()) < 5e-3, method


def test_refits_and_greedy_codes_run_on_it_too() -> None:
    x, words, weights = (t[0] for t in data(1, 9001, 64))
    x[4500] /= 1e4  # conjugate gradients would follow the one large row alone
    stages = torch.stack([words, 0.5 * words.flip(0), 0.25 * words])
    codes = encode_rows(x, stages, 1)
    fitted = refit(x, weights, codes, stages)
    sums, found = sum_rows(x, codes[:, 0], weights), nearest(x, words)
    with fused.torch_alone():
        assert (codes == encode_rows(x, stages, 1)).double().mean() > 0.999
        torch.testing.assert_close(fitted, refit(x, weights, codes, stages), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(sums, sum_rows(x, codes[:, 0], weights), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(sum_rows(weights, codes[:, 0]), fused.sum_rows(weights, codes[:, 0], None))
        assert (found[0] == nearest(x, words)[0]).double().mean() > 0.999


@pytest.mark.parametrize("count", [2, 255, 2048])
def test_other_numbers_of_codewords_are_left_to_torch(count: int) -> None:
    x, words = torch.randn(3000, 32, device="cuda"), torch.randn(count, 32, device="cuda")
    index, gain = nearest(x, words)
    scores = 2 * x.double() @ words.double().T - (words.double() ** 2).sum(1)
    assert torch.allclose(gain.double(), scores.amax(1), atol=1e-3)
    assert torch.allclose(scores.gather(1, index[:, None])[:, 0], scores.amax(1), atol=1e-3)


def test_what_is_refused() -> None:
    x, words, weights = data(2, 300, 64)
    with pytest.raises(GsrqError, match="vectors have width 513"):
        assign(torch.zeros(1, 4, 513, device=DEVICE), torch.zeros(1, 256, 513, device=DEVICE))
    with pytest.raises(GsrqError, match="weights: "):
        assign(x, words, weights.cpu())
    turned = words.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(assign(x, turned).codes, assign(x, words).codes)
    misaligned = torch.randn(2 * 300 * 64 + 1, device=DEVICE)[1:].reshape(2, 300, 64)
    assert torch.equal(assign(misaligned, words).codes, assign(misaligned.clone(), words).codes)


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    assert_clean(tool, Path(__file__).with_name("sanitized_clustering.py"), "ran 6 steps")

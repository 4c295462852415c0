"""Training of many sub-vectors at once against one after the other, and when the CUDA kernels are taken."""

from __future__ import annotations

import pytest
import torch

from gsrq_export import GsrqError, native
from gsrq_export.codec import fused, residual
from gsrq_export.codec.cluster import nearest, sum_rows
from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.cuda.cluster import assign, update


@pytest.mark.parametrize("method", ["gskm", "kmeans", "kmeans-spherical"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_at_once_is_one_after_the_other(method: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2001, 72, generator=g)
    x[:, 24:48] = x[torch.arange(2001) % 40, 24:48]  # 40 different vectors: empty clusters
    weights = torch.rand(2001, 3, generator=g) if weighted else None
    transform = torch.eye(24) + 0.1 * torch.randn(3, 24, 24, generator=g)
    training = Training(method, 3)  # type: ignore[arg-type]
    expected, log = train_codebook(x, weights, 24, 3, training, transform)
    for size in (1 << 30, 4 * 2001 * 24 * 2):  # all three; two, then one
        monkeypatch.setattr(residual, "TOGETHER", size)
        monkeypatch.setattr(residual, "_train_in_turn", residual._train_together)
        steps: list[int] = []
        found, other = train_codebook(x, weights, 24, 3, training, transform, steps.append)
        assert sum(steps) == 9
        assert other.train == pytest.approx(log.train, rel=1e-4)
        assert other.held_out == pytest.approx(log.held_out, rel=1e-4)
        assert other.usage == pytest.approx(log.usage, abs=0.01)  # of equal vectors any may be taken
        for g_ in (0, 2):
            torch.testing.assert_close(found.codewords[g_], expected.codewords[g_], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("groups", "rows", "width"), [(1, 1, 1), (2, 999, 7), (3, 54, 33)])
def test_the_reference_is_the_codecs_clustering(groups: int, rows: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(groups, rows, width, generator=g), torch.randn(groups, 256, width, generator=g)
    weights = torch.rand(groups, rows, generator=g)
    found = assign(x, words, weights)
    sums, totals = update(x, found.codes, "sums", weights)
    for i in range(groups):
        codes, gains = nearest(x[i], words[i])
        assert torch.equal(found.codes[i].long(), codes)
        torch.testing.assert_close(found.gains[i], gains)
        torch.testing.assert_close(
            found.inertia[i], (weights[i] * gains).sum(dtype=torch.float64), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(sums[i], sum_rows(x[i], codes, weights[i]))
        torch.testing.assert_close(totals[i], sum_rows(weights[i], codes))
        torch.testing.assert_close(fused.sum_rows(x[i], codes, weights[i]), sums[i])
        torch.testing.assert_close(fused.sum_rows(weights[i], codes, None), totals[i])
        assert torch.equal(fused.nearest(x[i], words[i])[0], codes)
        assert torch.equal(fused.encode(x[i], words[i : i + 1])[:, 0], codes)


def test_too_few_rows_are_refused_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GsrqError, match="94 calibration vectors for 256 codewords"):
        train_codebook(torch.randn(100, 8), None, 8, 1, Training())
    monkeypatch.setattr(residual, "_train_in_turn", residual._train_together)
    with pytest.raises(GsrqError, match="94 calibration vectors for 256 codewords"):
        train_codebook(torch.randn(100, 8), None, 8, 1, Training())


def test_the_kernels_are_taken_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert not fused.available(torch.device("cpu"), 128)
    monkeypatch.setattr(native, "find", lambda target: None)
    fused._usable.cache_clear()
    assert not fused.available(gpu, 128)
    assert fused.library_hash(gpu) is None
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    assert fused.available(gpu, 512)
    assert not fused.available(gpu, 513)
    with fused.torch_alone():
        assert not fused.available(gpu, 128)
    assert fused.available(gpu, 128)


def test_wrong_tensors_are_named() -> None:
    x, words = torch.randn(2, 30, 8), torch.randn(2, 256, 8)
    codes = torch.zeros(2, 30, dtype=torch.uint8)
    with pytest.raises(GsrqError, match=r"vectors are torch.float64 \[2, 30, 8\]"):
        assign(x.double(), words)
    with pytest.raises(GsrqError, match=r"words: torch.float32 \[2, 255, 8\] on cpu"):
        assign(x, words[:, 1:])
    with pytest.raises(GsrqError, match=r"weights: torch.float32 \[2, 29\] on cpu"):
        assign(x, words, torch.ones(2, 29))
    with pytest.raises(GsrqError, match=r"codes: torch.int64"):
        update(x, codes.long(), "sums")
    with pytest.raises(GsrqError, match="form gain-shape: words or norms is None"):
        update(x, codes, "gain-shape")

"""Codebook training: the clustering, the residual stages, the weights and the metric."""

from __future__ import annotations

import pytest
import torch

from gsrq_export.codec.cluster import Method, cluster, nearest
from gsrq_export.codec.metric import key_transform, value_transform
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.errors import GsrqError
from gsrq_export.model.introspect import LayerSpec

METHODS: tuple[Method, ...] = ("gskm", "kmeans", "kmeans-spherical")


def gaussian(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_gskm_codes_gaussians_better_than_kmeans_from_points() -> None:
    """The paper's Figure 4, in small: over the stages the gap opens, and closes with fair (spherical) seeds."""
    x = gaussian(6000, 64)
    left = {m: train_codebook(x, None, 64, 6, Training(m, 4))[1].held_out[-1] for m in METHODS}
    assert left["gskm"] < left["kmeans"] - 0.02
    assert abs(left["gskm"] - left["kmeans-spherical"]) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_distortion_is_what_it_says_and_improves(method: Method) -> None:
    x, weights = gaussian(3000, 8), torch.rand(3000, generator=seeded())
    first, last = (cluster(x, weights, method, n, seeded()) for n in (0, 10))
    assert last.distortion < first.distortion
    index, _ = nearest(x, last.words)
    assert torch.equal(index, last.assignment)
    assert torch.equal(index, torch.cdist(x.double(), last.words.double()).argmin(1))
    error = (weights * ((x - last.words[index]) ** 2).sum(1)).sum() / (weights * (x**2).sum(1)).sum()
    assert abs(float(error) - last.distortion) < 1e-4


def test_gskm_fixed_point() -> None:
    """At convergence a codeword is the mean projection of its members along their mean direction."""
    x = gaussian(2000, 3)
    found = cluster(x, torch.ones(2000), "gskm", 150, seeded())
    k = int(torch.bincount(found.assignment).argmax())
    members = x[found.assignment == k]
    shape = torch.nn.functional.normalize(torch.nn.functional.normalize(members).mean(0), dim=0)
    expected = (members @ shape).mean() * shape
    torch.testing.assert_close(found.words[k], expected, atol=0.02, rtol=0.05)


def test_weights_move_codewords() -> None:
    x, weights = gaussian(4000, 6), torch.rand(4000, generator=seeded()) ** 8
    for method in METHODS:
        error = []
        for w in (weights, torch.ones(4000)):
            found = cluster(x, w, method, 15, seeded())
            error.append(float((weights * ((x - found.words[found.assignment]) ** 2).sum(1)).sum()))
        assert error[0] < 0.97 * error[1], method


def test_few_distinct_rows_leave_nothing_nan() -> None:
    x = gaussian(3, 5).repeat(200, 1)
    for method in METHODS:
        found = cluster(x, torch.ones(600), method, 5, seeded())
        assert bool(torch.isfinite(found.words).all())
        assert found.distortion < 1e-4
    zeros = cluster(torch.zeros(600, 5), torch.ones(600), "gskm", 3, seeded())
    assert zeros.distortion == 0.0


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(GsrqError, match="255 calibration vectors for 256 codewords"):
        cluster(gaussian(255, 4), torch.ones(255), "gskm", 1, seeded())


def test_training_is_deterministic_and_counts_its_error() -> None:
    x = gaussian(3200, 24)
    ticks: list[int] = []
    book, log = train_codebook(x, None, 12, 4, Training(iterations=3), progress=ticks.append)
    again, _ = train_codebook(x, None, 12, 4, Training(iterations=3))
    other, _ = train_codebook(x, None, 12, 4, Training(iterations=3, seed=1))
    assert torch.equal(book.codewords, again.codewords)
    assert not torch.equal(book.codewords, other.codewords)
    assert len(ticks) == 8
    assert log.train == sorted(log.train, reverse=True)
    assert log.held_out[-1] > log.train[-1]
    held = torch.arange(3200) % 16 == 15
    for rows, said in ((x[~held], log.train[-1]), (x[held], log.held_out[-1])):
        parts = ((rows - book.decode(book.encode(rows))) ** 2).reshape(-1, 2, 12).sum((0, 2))
        whole = (rows**2).reshape(-1, 2, 12).sum((0, 2))
        assert abs(float((parts / whole).mean()) - said) < 2e-3


def test_gradient_weights() -> None:
    norms = torch.tensor([[0.0], [1.0], [3.0]])
    expected = torch.log1p(norms / 1.0)
    torch.testing.assert_close(gradient_weights(norms), expected / expected.mean())
    assert torch.equal(gradient_weights(torch.zeros(4, 2)), torch.ones(4, 2))


def test_metric_of_values_is_the_output_error() -> None:
    layer = LayerSpec(0, 0, 4, 2, 6, 0.4, 0.0, 0, False, 0)
    weight = gaussian(10, 24, 1)
    transform = value_transform(weight, layer, 12)
    x = gaussian(50, 12, 2)
    y = torch.zeros(50)
    for h in range(4):
        n = h // 2
        y += ((x[:, n * 6 : n * 6 + 6] @ weight[:, h * 6 : h * 6 + 6].T) ** 2).sum(1)
    z = ((x @ transform[0].T) ** 2).sum(1)
    torch.testing.assert_close(z / z.mean(), y / y.mean(), atol=0.05, rtol=0.05)


def test_metric_of_keys_is_equal_within_rotary_pairs() -> None:
    layer = LayerSpec(0, 0, 4, 2, 6, 0.4, 0.0, 0, False, 0)
    transform = key_transform(torch.rand(2, 6, generator=seeded()) + 0.5, layer, 4, 6)
    scale = torch.diagonal(transform, dim1=1, dim2=2)
    assert torch.equal(scale[:, 0], scale[:, 2])
    assert torch.equal(scale[:, 1], scale[:, 3])
    assert not torch.equal(scale[:, 4], scale[:, 5])
    assert torch.equal(transform, torch.diag_embed(scale))


def test_training_in_a_metric_lowers_that_metric() -> None:
    x = gaussian(4000, 8)
    transform = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.2, 0.2]))[None]
    plain, _ = train_codebook(x, None, 8, 2, Training())
    metric, log = train_codebook(x, None, 8, 2, Training(), transform)

    def error(book: object) -> float:
        rest = (x - book.decode(book.encode(x))) @ transform[0].T  # type: ignore[attr-defined]
        return float((rest**2).sum() / ((x @ transform[0].T) ** 2).sum())

    assert error(metric) < 0.9 * error(plain)
    assert abs(error(metric) - log.train[-1]) < 0.02

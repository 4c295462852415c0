"""The rivals' grouped k-means and the codec's own are one algorithm."""

from __future__ import annotations

import torch

from gsrq_export.baselines.kmeans import assign, grouped_kmeans
from gsrq_export.codec.cluster import cluster


def test_grouped_kmeans_is_kmeans_of_a_group() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3000, 4, generator=generator)
    x[1500:] = x[:1500].clone()  # doubles among the seeds leave clusters empty
    weights = torch.rand(3000, generator=generator)
    seeds = x[torch.randperm(3000, generator=torch.Generator().manual_seed(2))[:256]]
    assert len(seeds.unique(dim=0)) < 256
    for iterations in (0, 1, 2, 6):
        one = cluster(x, weights, "kmeans", iterations, torch.Generator().manual_seed(2))
        (words,) = grouped_kmeans(x[None], weights[None], iterations, torch.Generator().manual_seed(2))
        torch.testing.assert_close(words, one.words, atol=1e-5, rtol=1e-5)
        assert torch.equal(assign(x[None], one.words[None])[0][0], one.assignment)
        filled = len(one.assignment.unique())
        assert filled > 250 if iterations else filled < 256

"""Weighted k-means of many narrow groups at once: one clustering a group, all groups in the same operations.

What CQ needs: hundreds of groups of a few channels each; one by one they would wait for operations to be launched.
"""

from __future__ import annotations

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.cluster import reseeding_rows

SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}  # float32 scores formed at once: a cache's worth, or half a gigabyte


def grouped_kmeans(x: torch.Tensor, weights: torch.Tensor, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm from data points drawn uniformly; each group's best iterate.

    An empty cluster goes to one of the rows that are coded worst, out of a random tenth.

    Args:
        x: float32 [G, N, w], N >= 256.
        weights: float32 [G, N], >= 0.
        generator: on the CPU.
    Returns:
        float32 [G, 256, w].
    """
    groups, rows, _ = x.shape
    square = (x**2).sum(2)
    words = x[:, torch.randperm(rows, generator=generator)[:CODEBOOK_SIZE].to(x.device)]
    best, least = words, torch.full((groups,), float("inf"), dtype=torch.float64, device=x.device)
    for step in range(iterations + 1):
        index, gain = assign(x, words)
        error = weights * (square - gain)
        total = error.sum(1, dtype=torch.float64)
        best = torch.where((total < least)[:, None, None], words, best)
        least = torch.minimum(total, least)
        if step < iterations:
            words = _moved(x, weights, index, error, generator)
    return best


def assign(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of each row: index int64 [G, N], and 2 <x, c> - ||c||^2 float32 [G, N]."""
    bias = -(words**2).sum(2)[:, None]
    parts = [torch.baddbmm(bias, part, words.transpose(1, 2), alpha=2).max(2) for part in _chunks(x)]
    return torch.cat([p.indices for p in parts], 1), torch.cat([p.values for p in parts], 1)


def _moved(
    x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, error: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The weighted means of the clusters."""
    sums = _sums(torch.cat([x, torch.ones_like(x[..., :1])], 2) * weights[..., None], index)
    mass = sums[..., -1:]
    words = sums[..., :-1] / mass.clamp(min=1e-30)
    empty = mass[..., 0] <= 0
    if bool(empty.any()):
        some = reseeding_rows(x.shape[1], generator).to(x.device)
        worst = some[error[:, some].argsort(stable=True, dim=1, descending=True)[:, :CODEBOOK_SIZE]]
        pick = worst.gather(1, (empty.cumsum(1) - 1).clamp(min=0))
        words = torch.where(empty[..., None], x.gather(1, pick[..., None].expand_as(words)), words)
    return words


def _sums(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[G, 256, n]: the sum of each cluster's rows [G, N, n], in an order that is the same every time."""
    groups, _, width = rows.shape
    if rows.device.type == "cpu":
        place = index + CODEBOOK_SIZE * torch.arange(groups)[:, None]
        total = rows.new_zeros(groups * CODEBOOK_SIZE, width)
        return total.index_add_(0, place.flatten(), rows.flatten(0, 1)).reshape(groups, CODEBOOK_SIZE, width)
    sums = rows.new_zeros(groups, CODEBOOK_SIZE, width)
    for part, of in zip(_chunks(rows), _chunks(index), strict=True):
        member = part.new_zeros(*part.shape[:2], CODEBOOK_SIZE).scatter_(2, of[..., None], 1.0)
        sums = torch.baddbmm(sums, member.transpose(1, 2), part)
    return sums  # not index_add_, whose atomics would not repeat to the bit


def _chunks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    limit = SCORES.get(x.device.type, SCORES["cpu"])
    return torch.split(x, max(1, limit // (x.shape[0] * CODEBOOK_SIZE)), 1)

"""Clustering for one residual stage: gain-shape k-means (GSKM, arXiv 2607.01065) and plain k-means.

A GSKM codeword is g * s with a unit shape s and a gain g >= 0. All sums run over rows in blocks of a fixed size,
so the result depends on the data and the seed alone, not on how much fits in memory at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec import fused
from gsrq_export.errors import GsrqError

Method = Literal["gskm", "kmeans", "kmeans-spherical"]
ROWS = 8192  # a block of rows
GPU_ROWS = 65536  # there launches cost more than memory
TINY = 1e-12


@dataclass(frozen=True)
class Clusters:
    """The best codewords seen.

    Attributes:
        words: float32 [256, D].
        assignment: int64 [N], the nearest codeword of each row.
        distortion: weighted sum of squared errors over the weighted sum of squared norms.
    """

    words: torch.Tensor
    assignment: torch.Tensor
    distortion: float


def nearest(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codeword of each row: index int64 [N], and 2 <x, c> - ||c||^2 float32 [N]."""
    if fused.available(x.device, x.shape[1]):
        return fused.nearest(x, words)
    bias = -(words**2).sum(1)
    scores = [torch.addmm(bias, block, words.T, alpha=2).max(1) for block in torch.split(x, _rows(x))]
    return torch.cat([s.indices for s in scores]), torch.cat([s.values for s in scores])


def cluster(
    x: torch.Tensor,
    weights: torch.Tensor,
    method: Method,
    iterations: int,
    generator: torch.Generator,
) -> Clusters:
    """256 codewords for the rows of ``x``.

    Args:
        x: float32 [N, D], N >= 256.
        weights: float32 [N], >= 0.
        method: gskm; kmeans, seeded with data points; kmeans-spherical, seeded with directions.
        iterations: updates; no monotone descent is promised by GSKM, so the best iterate is returned.
        generator: on the CPU, for seeds and empty clusters.
    """
    check_rows(x.shape[0])
    norm = x.norm(dim=1)
    energy = float((weights * norm**2).sum(dtype=torch.float64))
    words = _seed(x, weights, method, generator)
    best: Clusters | None = None
    for step in range(iterations + 1):
        assignment, gain = nearest(x, words)
        error = energy - float((weights * gain).sum(dtype=torch.float64))
        distortion = max(0.0, error) / energy if energy > 0 else 0.0
        if best is None or distortion < best.distortion:
            best = Clusters(words, assignment, distortion)
        if step < iterations:
            words = _update(x, weights, assignment, gain, words, norm, method, generator)
    assert best is not None
    return best


def check_rows(rows: int) -> None:
    """Raises GsrqError where there are too few rows for the codewords."""
    if rows < CODEBOOK_SIZE:
        raise GsrqError(
            f"{rows} calibration vectors for {CODEBOOK_SIZE} codewords",
            "raise traffic.sequences or traffic.sequence_length; 100 vectors a codeword are a fair minimum",
        )


def _seed(x: torch.Tensor, weights: torch.Tensor, method: Method, generator: torch.Generator) -> torch.Tensor:
    points = x[torch.randperm(x.shape[0], generator=generator)[:CODEBOOK_SIZE].to(x.device)]
    if method == "kmeans":
        return points.clone()
    # Directions of data points, each scaled to the mean length along it of the rows nearest in angle.
    shapes = points / points.norm(dim=1, keepdim=True).clamp(min=TINY)
    along = [(block @ shapes.T).max(1) for block in torch.split(x, ROWS)]
    assignment = torch.cat([a.indices for a in along])
    total = sum_rows(weights, assignment)
    gains = sum_rows(weights * torch.cat([a.values for a in along]), assignment) / total.clamp(min=TINY)
    seeds: torch.Tensor = gains.clamp(min=0)[:, None] * shapes
    return seeds


def _update(
    x: torch.Tensor,
    weights: torch.Tensor,
    assignment: torch.Tensor,
    gain: torch.Tensor,
    words: torch.Tensor,
    norm: torch.Tensor,
    method: Method,
    generator: torch.Generator,
) -> torch.Tensor:
    total = sum_rows(weights, assignment)
    filled = total > 0
    updated = sum_rows(x, assignment, weights) / total.clamp(min=TINY)[:, None]
    if method == "gskm":
        direction = sum_rows(x, assignment, weights / norm.clamp(min=TINY)) / total.clamp(min=TINY)[:, None]
        length = direction.norm(dim=1, keepdim=True)
        old = words / words.norm(dim=1, keepdim=True).clamp(min=TINY)
        shapes = torch.where(length > 1e-6, direction / length.clamp(min=TINY), old)
        gains = (updated * shapes).sum(1).clamp(min=0)  # the mean of <x, s> over the members
        updated = gains[:, None] * shapes
    reseed(updated, ~filled, x, weights * (norm**2 - gain), generator)
    return updated


def reseed(
    words: torch.Tensor, empty: torch.Tensor, x: torch.Tensor, error: torch.Tensor, generator: torch.Generator
) -> None:
    """Replace codewords without members, in place, by rows that are coded worst.

    Args:
        words: float32 [256, D]; empty: bool [256].
        x: float32 [N, D]; error: float32 [N], weighted.
    """
    which = torch.nonzero(empty).flatten()
    if len(which):
        some = reseeding_rows(len(x), generator).to(x.device)
        worst = some[error[some].argsort(descending=True, stable=True)[: len(which)]]
        words[which] = x[worst]


def reseeding_rows(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Rows, int64, of which those coded worst reseed empty clusters: a random tenth, so that seeds differ."""
    return torch.randperm(rows, generator=generator)[: max(rows // 10, CODEBOOK_SIZE)]


def sum_rows(values: torch.Tensor, assignment: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sums over the rows of each cluster, in an order that is the same every time.

    Args:
        values: float32 [N] or [N, D].
        assignment: int64 [N], below 256.
        scale: float32 [N], a factor on each row of [N, D]; None: 1.
    Returns:
        float32 [256] or [256, D].
    """
    out: torch.Tensor = torch.zeros((CODEBOOK_SIZE, *values.shape[1:]), device=values.device)
    if values.device.type == "cpu":
        out.index_add_(0, assignment, values if scale is None else values * scale[:, None])
        return out
    if fused.available(values.device, values.shape[-1] if values.ndim > 1 else 1):
        return fused.sum_rows(values, assignment, scale)
    # As a product with the one-hot assignment: atomics of index_add_ would not repeat to the bit.
    of = torch.ones_like(values[:, 0] if values.ndim > 1 else values) if scale is None else scale
    each = torch.arange(CODEBOOK_SIZE, device=values.device)
    size = _rows(values)
    for rows, index, factor in zip(*(torch.split(t, size) for t in (values, assignment, of)), strict=True):
        member = torch.where(index[:, None] == each, factor[:, None], 0)
        out += member.T @ rows
    return out


def _rows(x: torch.Tensor) -> int:
    return GPU_ROWS if x.is_cuda else ROWS

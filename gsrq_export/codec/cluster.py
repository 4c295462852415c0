"""Clustering for one residual stage: gain-shape k-means (GSKM, arXiv 2607.01065) and plain k-means.

A GSKM codeword is g * s with a unit shape s and a gain g >= 0. All sums run over rows in blocks of a fixed size,
so the result depends on the data and the seed alone, not on how much fits in memory at once. Where many processes
hold the rows, those of codec/rows.py add up the same way however the rows are spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec import fused
from gsrq_export.codec.rows import Rows, whole
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
    """The nearest of any number of codewords to each row: index int64 [N], and 2 <x, c> - ||c||^2 float32 [N]."""
    if len(words) == CODEBOOK_SIZE and fused.available(x.device, x.shape[1]):
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
    found = cluster_parts([x], [weights], method, iterations, generator, whole(len(x)))
    return Clusters(found.words, found.assignment[0], found.distortion)


@dataclass(frozen=True)
class PartClusters:
    """``Clusters`` of rows in parts: ``assignment`` is of each part that is here."""

    words: torch.Tensor
    assignment: list[torch.Tensor]
    distortion: float


def cluster_parts(
    x: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    method: Method,
    iterations: int,
    generator: torch.Generator,
    rows: Rows,
) -> PartClusters:
    """``cluster`` of rows in parts; every process gets the same codewords.

    Args:
        x: float32 [n, D], the parts here.
        weights: float32 [n], of each.
        generator: in the same state on every process.
    """
    check_rows(rows.count)
    here = range(len(x))
    norms = [part.norm(dim=1) for part in x]
    energy = float(rows.total(partial(_inner, weights, [norm**2 for norm in norms])))
    words = _seed(x, weights, method, generator, rows)
    best: PartClusters | None = None
    for step in range(iterations + 1):
        found = [nearest(part, words) for part in x]
        gains = [gain for _, gain in found]
        error = energy - float(rows.total(partial(_inner, weights, gains)))
        distortion = max(0.0, error) / energy if energy > 0 else 0.0
        assignment = [index for index, _ in found]
        if best is None or distortion < best.distortion:
            best = PartClusters(words, assignment, distortion)
        if step < iterations:
            words, empty = _update(x, weights, assignment, words, norms, method, rows)
            errors = [weights[i] * (norms[i] ** 2 - gains[i]) for i in here]
            reseed(words, empty, x, errors, generator, rows)
    assert best is not None
    return best


def _inner(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor], i: int) -> torch.Tensor:
    return (weights[i] * values[i]).sum(dtype=torch.float64)


def check_rows(rows: int) -> None:
    """Raises GsrqError where there are too few rows for the codewords."""
    if rows < CODEBOOK_SIZE:
        raise GsrqError(
            f"{rows} calibration vectors for {CODEBOOK_SIZE} codewords",
            "raise traffic.sequences or traffic.sequence_length; 100 vectors a codeword are a fair minimum",
        )


def _seed(
    x: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], method: Method, generator: torch.Generator, rows: Rows
) -> torch.Tensor:
    points = rows.take(x, torch.randperm(rows.count, generator=generator)[:CODEBOOK_SIZE])
    if method == "kmeans":
        return points
    # Directions of data points, each scaled to the mean length along it of the rows nearest in angle.
    shapes = points / points.norm(dim=1, keepdim=True).clamp(min=TINY)

    def along(i: int) -> torch.Tensor:
        nearest_in_angle = [(block @ shapes.T).max(1) for block in torch.split(x[i], ROWS)]
        assignment = torch.cat([a.indices for a in nearest_in_angle])
        length = torch.cat([a.values for a in nearest_in_angle])
        return torch.stack([sum_rows(weights[i], assignment), sum_rows(weights[i] * length, assignment)])

    total, length = rows.total(along)
    seeds: torch.Tensor = (length / total.clamp(min=TINY)).clamp(min=0)[:, None] * shapes
    return seeds


def _update(
    x: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    assignment: Sequence[torch.Tensor],
    words: torch.Tensor,
    norms: Sequence[torch.Tensor],
    method: Method,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New codewords, and which of them have no members, bool [256]."""

    def sums(i: int) -> torch.Tensor:
        found = [sum_rows(weights[i], assignment[i])[:, None], sum_rows(x[i], assignment[i], weights[i])]
        if method == "gskm":
            found.append(sum_rows(x[i], assignment[i], weights[i] / norms[i].clamp(min=TINY)))
        return torch.cat(found, 1)

    width = words.shape[1]
    sizes = [1] + [width] * (2 if method == "gskm" else 1)
    total, *means = torch.split(rows.total(sums), sizes, 1)
    means = [mean / total.clamp(min=TINY) for mean in means]
    updated = means[0]
    if method == "gskm":
        direction = means[1]
        length = direction.norm(dim=1, keepdim=True)
        old = words / words.norm(dim=1, keepdim=True).clamp(min=TINY)
        shapes = torch.where(length > 1e-6, direction / length.clamp(min=TINY), old)
        gains = (updated * shapes).sum(1).clamp(min=0)  # the mean of <x, s> over the members
        updated = gains[:, None] * shapes
    return updated, total[:, 0] <= 0


def reseed(
    words: torch.Tensor,
    empty: torch.Tensor,
    x: Sequence[torch.Tensor],
    error: Sequence[torch.Tensor],
    generator: torch.Generator,
    rows: Rows,
) -> None:
    """Replace codewords without members, in place, by rows that are coded worst.

    Args:
        words: float32 [256, D]; empty: bool [256].
        x: float32 [n, D], the parts here; error: float32 [n], weighted, of each.
    """
    which = torch.nonzero(empty).flatten()
    if len(which):
        some = reseeding_rows(rows.count, generator)
        worst = rows.take(error, some).argsort(descending=True, stable=True)[: len(which)]
        words[which] = rows.take(x, some[worst.cpu()])


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

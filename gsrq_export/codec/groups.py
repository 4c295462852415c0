"""Residual training of many sub-vectors at once, each step one launch for all: the way on a GPU with the CUDA kernels.

What is done to each sub-vector, random draws included, is what codec/cluster.py and codec/residual.py do to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.cluster import TINY, Method, check_rows, reseed
from gsrq_export.codec.rows import whole
from gsrq_export.cuda.cluster import Assigned, assign, update


class Seeds:
    """Rows that seed each group's codewords; those of the next stage are drawn in threads while the GPU works.

    A permutation of all rows takes the CPU longer than an iteration takes a GPU. What was drawn ahead is left out where
    its generator was used in between, for empty clusters: rows are those of drawing in turn.

    Args:
        generators: of each group, on the CPU.
        rows: to draw from.
    """

    def __init__(self, generators: Sequence[torch.Generator], rows: int) -> None:
        self.generators, self.rows = generators, rows
        self._pool = ThreadPoolExecutor()
        self._ahead = [self._start(generator) for generator in generators]

    def draw(self) -> torch.Tensor:
        """int64 [G, 256]."""
        for i, generator in enumerate(self.generators):
            if not torch.equal(self._ahead[i][0], generator.get_state()):
                self._ahead[i] = self._start(generator)
        drawn = []
        for i, generator in enumerate(self.generators):
            rows, after = self._ahead[i][1].result()
            generator.set_state(after)
            self._ahead[i] = self._start(generator)
            drawn.append(rows)
        return torch.stack(drawn)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, generator: torch.Generator) -> tuple[torch.Tensor, Future[tuple[torch.Tensor, torch.Tensor]]]:
        state = generator.get_state()
        return state, self._pool.submit(self._permute, state)

    def _permute(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator()
        generator.set_state(state)
        rows = torch.randperm(self.rows, generator=generator)[:CODEBOOK_SIZE]
        return rows, generator.get_state()


def cluster_groups(
    x: torch.Tensor, weights: torch.Tensor, method: Method, iterations: int, seeds: Seeds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``cluster`` for every group: the best codewords seen.

    Args:
        x: float32 [G, N, D], N >= 256.
        weights: float32 [G, N], >= 0.
        seeds: and the generators that empty clusters draw from.
    Returns:
        words float32 [G, 256, D], codes uint8 [G, N], distortion float64 [G].
    """
    check_rows(x.shape[1])
    norms = x.norm(dim=2)
    energy = (weights * norms**2).sum(1, dtype=torch.float64)
    words = _seed(x, weights, method, seeds)
    for step in range(iterations + 1):
        found = assign(x, words, weights)
        error = (energy - found.inertia).clamp(min=0)
        distortion = torch.where(energy > 0, error / energy, torch.zeros_like(energy))
        if step == 0:
            best = (words, found.codes, distortion)
        else:
            better = distortion < best[2]
            fresh = (words, found.codes, distortion)
            best = tuple(  # type: ignore[assignment]
                torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(fresh, best, strict=True)
            )
        if step < iterations:
            words = _update(x, weights, found, words, norms, method, seeds.generators)
    return best


def train_groups(
    train: torch.Tensor,
    weights: torch.Tensor,
    held: torch.Tensor,
    words: torch.Tensor,
    transform: torch.Tensor,
    method: Method,
    iterations: int,
    generators: Sequence[torch.Generator],
    progress: Callable[[int], None],
) -> torch.Tensor:
    """All stages of every group.

    Args:
        train: float32 [G, N, D], in the metric's space; becomes what the stages leave over.
        weights: float32 [G, N].
        held: float32 [G, M, D], rows that are not trained on; likewise.
        words: float16 [G, R, 256, D], filled in.
        transform: float32 [G, D, D], the metric.
        progress: called with G after each stage.
    Returns:
        float64 [G, 3, R]: relative squared error of the training and the held-out rows, and the share of words used.
    """
    back = torch.linalg.inv(transform.double()).transpose(1, 2)
    there = transform.double().transpose(1, 2)
    energy = [_energy(x) for x in (train, held)]
    energy = [torch.where(e > 0, e, torch.ones_like(e)) for e in energy]
    log = []
    with closing(Seeds(generators, train.shape[1])) as seeds:
        for r in range(words.shape[1]):
            found, codes, _ = cluster_groups(train, weights, method, iterations, seeds)
            words[:, r] = (found.double() @ back).half()
            stored = (words[:, r].double() @ there).float()  # residuals are those of the stored codewords
            _subtract(train, stored, codes)
            if held.shape[1]:
                _subtract(held, stored, assign(held, stored).codes)
            used = torch.zeros(len(train), CODEBOOK_SIZE, dtype=torch.float64, device=train.device)
            used.scatter_(1, codes.long(), 1.0)
            log.append(torch.stack([_energy(train) / energy[0], _energy(held) / energy[1], used.mean(1)], 1))
            progress(len(train))
    return torch.stack(log, 2)


def _energy(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares of each group, float64 [G], without a float64 copy of x."""
    squares: torch.Tensor = (x.norm(dim=2).double() ** 2).sum(1)
    return squares


def _subtract(x: torch.Tensor, words: torch.Tensor, codes: torch.Tensor) -> None:
    for rows, stage, code in zip(x, words, codes, strict=True):
        rows -= stage[code.long()]


def _seed(x: torch.Tensor, weights: torch.Tensor, method: Method, seeds: Seeds) -> torch.Tensor:
    drawn = seeds.draw().to(x.device)
    points = torch.stack([rows[index] for rows, index in zip(x, drawn, strict=True)])
    if method == "kmeans":
        return points
    # Directions of data points, each scaled to the mean length along it of the rows nearest in angle.
    shapes = points / points.norm(dim=2, keepdim=True).clamp(min=TINY)
    means = update(x, assign(x, shapes, weights, inner=True).codes, "means", weights).words
    words: torch.Tensor = (means * shapes).sum(2, keepdim=True).clamp(min=0) * shapes
    return words


def _update(
    x: torch.Tensor,
    weights: torch.Tensor,
    found: Assigned,
    words: torch.Tensor,
    norms: torch.Tensor,
    method: Method,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    form = "gain-shape" if method == "gskm" else "means"
    fresh, totals = update(x, found.codes, form, weights, norms, words)  # type: ignore[arg-type]
    empty = ~(totals > 0)
    for g in torch.nonzero(empty.any(1)).flatten().tolist():  # the one wait of an iteration
        error = weights[g] * (norms[g] ** 2 - found.gains[g])
        reseed(fresh[g], empty[g], [x[g]], [error], generators[g], whole(x.shape[1]))
    return fresh

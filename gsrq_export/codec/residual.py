"""Residual codebooks from calibration vectors: one clustering a stage, each on what the stages before left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec import fused
from gsrq_export.codec.cluster import Method, cluster, nearest
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.refit import held_out, refit_codebook
from gsrq_export.errors import GsrqError

TOGETHER = 4 << 30  # bytes of vectors that are trained on at once


@dataclass(frozen=True)
class Training:
    """Options of codebook training; the paper's are gskm, 40 to 100 iterations."""

    method: Method = "gskm"
    iterations: int = 10
    seed: int = 0
    beam: int = 1  # of the encoding before each refit
    refits: int = 0  # see codec/refit.py


@dataclass(frozen=True)
class Distortion:
    """How well a codebook codes, averaged over its sub-vectors.

    Attributes:
        train: relative mean squared error on the training rows after each stage.
        held_out: the same on rows that were not trained on.
        usage: share of the 256 codewords used by the training rows, by stage.
    """

    train: list[float]
    held_out: list[float]
    usage: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gradient_weights(norms: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """w = log(1 + lambda * ||dL/dx||), lambda = tau / median norm (the paper's importance weights).

    Args:
        norms: float32 [N, groups], gradient norms of each sub-vector.
    Returns:
        float32 [N, groups], mean 1 in each column. All ones where every gradient is zero.
    """
    median = norms.median(0).values
    scale = torch.where(median > 0, median, norms.mean(0))
    weights = torch.log1p(tau * norms / scale.clamp(min=1e-30))
    mean = weights.mean(0)
    return torch.where(mean > 0, weights / mean.clamp(min=1e-30), torch.ones_like(weights))


def widened(norms: torch.Tensor, parts: int) -> torch.Tensor:
    """Gradient norms of sub-vectors of ``parts`` measured ones each: float32 [N, groups] to [N, groups / parts]."""
    return (norms.reshape(len(norms), -1, parts) ** 2).sum(2).sqrt()


def train_codebook(
    vectors: torch.Tensor,
    weights: torch.Tensor | None,
    width: int,
    stages: int,
    training: Training,
    transform: torch.Tensor | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[Codebook, Distortion]:
    """Train one codebook on keys or values of one layer.

    Args:
        vectors: [N, groups * width], the KV heads of each token concatenated.
        weights: float32 [N, groups], or None for all ones.
        width: elements of a sub-vector (D).
        stages: residual stages (R).
        transform: float32 [groups, width, width], the metric; None for squared error.
        progress: called with the number of sub-vectors that finished a stage.
    Raises:
        GsrqError: too few vectors, or vectors that are not finite.
    """
    rows, total = vectors.shape
    groups = total // width
    if groups * width != total:
        raise GsrqError(f"width {width} does not divide the {total} elements of a token", "choose a divisor")
    if not bool(torch.isfinite(vectors).all()):
        raise GsrqError("calibration vectors hold NaN or infinity", "check the model's weights and dtype")
    if transform is None:
        transform = torch.eye(width).expand(groups, width, width)
    transform = transform.to(vectors.device, torch.float32).contiguous()
    held = held_out(rows, vectors.device)
    words = torch.empty(groups, stages, CODEBOOK_SIZE, width, dtype=torch.float16, device=vectors.device)
    train_groups = _train_together if fused.available(vectors.device, width) else _train_in_turn
    logs = train_groups(vectors, weights, held, words, transform, training, progress)
    train, unseen, usage = (row.tolist() for row in logs.mean(0))
    book = Codebook(words, transform)
    if training.refits:
        book, train, unseen = refit_codebook(book, vectors, weights, training.beam, training.refits)
    return book, Distortion(train, unseen, usage)


def _generator(training: Training, group: int) -> torch.Generator:
    return torch.Generator().manual_seed(training.seed * 1_000_003 + group)


def _train_in_turn(
    vectors: torch.Tensor,
    weights: torch.Tensor | None,
    held: torch.Tensor,
    words: torch.Tensor,
    transform: torch.Tensor,
    training: Training,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Fills ``words`` [groups, R, 256, D], one sub-vector after the other.

    Args:
        held: bool [N], rows that are not trained on.
    Returns:
        [groups, 3, R]: relative error of the training and the held-out rows, and usage, by stage.
    """
    logs = []
    groups, width = transform.shape[:2]
    for g in range(groups):
        x = vectors[:, g * width : (g + 1) * width].float() @ transform[g].T
        w = weights[:, g].to(x.device) if weights is not None else x.new_ones(len(x))
        back = torch.linalg.inv(transform[g].double())
        generator = _generator(training, g)
        logs.append(
            _train_group(x[~held], w[~held], x[held], words[g], transform[g], back, training, generator, progress)
        )
    return torch.tensor(logs)


def _train_together(
    vectors: torch.Tensor,
    weights: torch.Tensor | None,
    held: torch.Tensor,
    words: torch.Tensor,
    transform: torch.Tensor,
    training: Training,
    progress: Callable[[int], None],
) -> torch.Tensor:
    """The same on the CUDA kernels, of as many sub-vectors at once as ``TOGETHER`` bytes hold."""
    from gsrq_export.codec.groups import train_groups

    groups, width = transform.shape[:2]
    size = max(1, TOGETHER // (4 * len(vectors) * width))
    logs = []
    for start in range(0, groups, size):
        part = slice(start, min(groups, start + size))
        turned = transform[part].transpose(1, 2)
        split = [
            vectors[rows, part.start * width : part.stop * width].reshape(-1, len(turned), width).transpose(0, 1)
            for rows in (~held, held)
        ]
        train, unseen = (x.float() @ turned for x in split)
        del split
        w = train.new_ones(train.shape[:2])
        if weights is not None:
            w = weights[:, part].to(train.device)[~held].T.contiguous()
        generators = [_generator(training, g) for g in range(part.start, part.stop)]
        options = training.method, training.iterations, generators, progress
        logs.append(train_groups(train, w, unseen, words[part], transform[part], *options))
    return torch.cat(logs).cpu()


def _train_group(
    train: torch.Tensor,
    weights: torch.Tensor,
    held: torch.Tensor,
    words: torch.Tensor,
    transform: torch.Tensor,
    back: torch.Tensor,
    training: Training,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> list[list[float]]:
    """Fills ``words`` [R, 256, D]; returns distortion on the training and held-out rows and usage, by stage."""
    energy = [float((x.double() ** 2).sum()) or 1.0 for x in (train, held)]
    log: list[list[float]] = [[], [], []]
    for r in range(words.shape[0]):
        found = cluster(train, weights, training.method, training.iterations, generator)
        words[r] = (found.words.double() @ back.T).half()
        stored = (words[r].double() @ transform.double().T).float()  # residuals are those of the stored codewords
        train = train - stored[found.assignment]
        held = held - stored[nearest(held, stored)[0]]
        for i, x in enumerate((train, held)):
            log[i].append(float((x.double() ** 2).sum()) / energy[i])
        used = torch.bincount(found.assignment, minlength=CODEBOOK_SIZE) > 0
        log[2].append(float(used.float().mean()))
        progress(1)
    return log

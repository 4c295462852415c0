"""Residual codebooks from calibration vectors: one clustering a stage, each on what the stages before left over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec import fused
from gsrq_export.codec.cluster import Method, cluster_parts, nearest
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.refit import HOLD_OUT, held_out, refit_codebook, refit_parts
from gsrq_export.codec.rows import Rows, whole
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
    transform = _checked([vectors], width, transform)
    groups = len(transform)
    held = held_out(len(vectors), vectors.device)
    words = torch.empty(groups, stages, CODEBOOK_SIZE, width, dtype=torch.float16, device=vectors.device)
    train_groups = _train_together if fused.available(vectors.device, width) else _train_in_turn
    logs = train_groups(vectors, weights, held, words, transform, training, progress)
    train, unseen, usage = (row.tolist() for row in logs.mean(0))
    book = Codebook(words, transform)
    if training.refits:
        book, train, unseen = refit_codebook(book, vectors, weights, training.beam, training.refits)
    return book, Distortion(train, unseen, usage)


def train_parts(
    vectors: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None,
    width: int,
    stages: int,
    training: Training,
    rows: Rows,
    transform: torch.Tensor | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[Codebook, Distortion]:
    """``train_codebook`` of vectors in parts; every process gets the same codebook, however the parts are spread.

    Args:
        vectors: [n, groups * width], the parts here; their bounds must be multiples of 16, but the last.
        weights: float32 [n, groups], of each; None: all ones.
        transform: the same on every process.
    """
    transform = _checked(vectors, width, transform)
    words = torch.empty(len(transform), stages, CODEBOOK_SIZE, width, dtype=torch.float16, device=vectors[0].device)
    logs = _train_each(vectors, weights, words, transform, training, progress, rows)
    train, unseen, usage = (row.tolist() for row in logs.mean(0))
    book = Codebook(words, transform)
    if training.refits:
        book, train, unseen = refit_parts(book, vectors, weights, training.beam, training.refits, rows)
    return book, Distortion(train, unseen, usage)


def _checked(vectors: Sequence[torch.Tensor], width: int, transform: torch.Tensor | None) -> torch.Tensor:
    """The transform, float32 [groups, width, width], where the vectors lie; refuses what cannot be trained on."""
    total = vectors[0].shape[1]
    groups = total // width
    if groups * width != total:
        raise GsrqError(f"width {width} does not divide the {total} elements of a token", "choose a divisor")
    if not all(bool(torch.isfinite(part).all()) for part in vectors):
        raise GsrqError("calibration vectors hold NaN or infinity", "check the model's weights and dtype")
    if transform is None:
        transform = torch.eye(width).expand(groups, width, width)
    return transform.to(vectors[0].device, torch.float32).contiguous()


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
    of = None if weights is None else [weights]
    return _train_each([vectors], of, words, transform, training, progress, whole(len(vectors)))


def _train_each(
    vectors: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None,
    words: torch.Tensor,
    transform: torch.Tensor,
    training: Training,
    progress: Callable[[int], None],
    rows: Rows,
) -> torch.Tensor:
    """``_train_in_turn`` of vectors in parts."""
    logs = []
    groups, width = transform.shape[:2]
    held = [held_out(len(part), part.device) for part in vectors]
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        x = [part[:, columns].float() @ transform[g].T for part in vectors]
        w = [part.new_ones(len(part)) for part in x]
        if weights is not None:
            w = [part[:, g].to(x[0].device) for part in weights]
        train, trained, unseen = (
            [part[~rest] for part, rest in zip(x, held, strict=True)],
            [part[~rest] for part, rest in zip(w, held, strict=True)],
            [part[rest] for part, rest in zip(x, held, strict=True)],
        )
        logs.append(_train_group(train, trained, unseen, words[g], transform[g], training, g, progress, rows))
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


def _members(assignment: Sequence[torch.Tensor], i: int) -> torch.Tensor:
    """Rows of each cluster."""
    return torch.bincount(assignment[i], minlength=CODEBOOK_SIZE)


def _train_group(
    train: list[torch.Tensor],
    weights: list[torch.Tensor],
    held: list[torch.Tensor],
    words: torch.Tensor,
    transform: torch.Tensor,
    training: Training,
    group: int,
    progress: Callable[[int], None],
    rows: Rows,
) -> list[list[float]]:
    """Fills ``words`` [R, 256, D]; returns distortion on the training and held-out rows and usage, by stage."""
    back, generator = torch.linalg.inv(transform.double()), _generator(training, group)
    trained = rows.without(HOLD_OUT)

    def energies() -> list[float]:
        """Of the training and of the held-out rows."""
        both = (train, held)
        found: list[float] = rows.total(lambda i: torch.stack([(x[i].double() ** 2).sum() for x in both])).tolist()
        return found

    whole_energy = [energy or 1.0 for energy in energies()]
    log: list[list[float]] = [[], [], []]
    for r in range(words.shape[0]):
        found = cluster_parts(train, weights, training.method, training.iterations, generator, trained)
        words[r] = (found.words.double() @ back.T).half()
        stored = (words[r].double() @ transform.double().T).float()  # residuals are those of the stored codewords
        for i, assignment in enumerate(found.assignment):
            train[i] = train[i] - stored[assignment]
            held[i] = held[i] - stored[nearest(held[i], stored)[0]]
        for i, energy in enumerate(energies()):
            log[i].append(energy / whole_energy[i])
        members = trained.total(partial(_members, found.assignment))
        log[2].append(float((members > 0).float().mean()))
        progress(1)
    return log

"""Least squares over all stages of a residual codebook at once.

Stage-wise clustering fits each stage to what the greedy codes before it left. With the codes held fixed, the best
codewords of all stages together solve min sum_i w_i ||x_i - sum_r c_r[code_ir]||^2: a sparse linear problem, which
conjugate gradients solve from the present codewords without forming its matrix. (The codebook update of additive
and residual quantizers: Martinez et al., "Revisiting additive quantization", ECCV 2016.)
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gsrq_export.codec import fused
from gsrq_export.codec.cluster import GPU_ROWS, sum_rows
from gsrq_export.codec.codebook import ENCODE_CHUNK, Codebook, beam_search

HOLD_OUT = 16  # every 16th token is kept from training, to measure the distortion of unseen vectors
PSEUDO_COUNT = 1.0  # a vector of mean weight that says "stay": codewords seen rarely hardly move
STEPS = 8  # of conjugate gradients; codes change afterwards, so an exact solution is not worth more


def held_out(rows: int, device: torch.device | str) -> torch.Tensor:
    """bool [rows]: the calibration vectors that are not trained on."""
    return torch.arange(rows, device=device) % HOLD_OUT == HOLD_OUT - 1


def refit_codebook(
    book: Codebook, vectors: torch.Tensor, weights: torch.Tensor | None, beam: int, rounds: int
) -> tuple[Codebook, list[float], list[float]]:
    """Encode and refit by turns; each sub-vector keeps the words that code unseen vectors best.

    Args:
        vectors: [N, groups * width], of which those of ``held_out`` are not trained on.
        weights: float32 [N, groups], or None for all ones.
        beam: of encoding.
        rounds: refits; 0 measures only.
    Returns:
        The codebook, and its relative squared error after each stage on the training and on the unseen vectors.
    """
    words = book.codewords.to(vectors.device, copy=True)
    held = held_out(len(vectors), vectors.device)
    logs = []
    for g in range(book.groups):
        transform = book.transform[g].to(vectors.device).double()
        back = torch.linalg.inv(transform).T
        x = vectors[:, g * book.width : (g + 1) * book.width].float() @ transform.float().T
        w = weights[:, g].to(x.device)[~held] if weights is not None else x.new_ones(int((~held).sum()))
        stored = (words[g].double() @ transform.T).float()
        codes = encode_rows(x, stored, beam)
        best = _errors(x, stored, codes, held)
        for _ in range(rounds):
            fitted = (refit(x[~held], w, codes[~held], stored).double() @ back).half()
            stored = (fitted.double() @ transform.T).float()
            codes = encode_rows(x, stored, beam)
            found = _errors(x, stored, codes, held)
            if found[1][-1] < best[1][-1]:
                best = found
                words[g] = fitted
        logs.append(best)
    train, unseen = torch.tensor(logs).mean(0).tolist()
    return replace(book.to(vectors.device), codewords=words), train, unseen


def _errors(x: torch.Tensor, words: torch.Tensor, codes: torch.Tensor, held: torch.Tensor) -> list[list[float]]:
    """Relative squared error after each stage, of the training and of the held-out rows."""
    energy = [float((part.double() ** 2).sum()) or 1.0 for part in (x[~held], x[held])]
    errors: list[list[float]] = [[], []]
    for r in range(len(words)):
        x = x - words[r][codes[:, r]]
        norms = (x.double() ** 2).sum(1)
        for i, part in enumerate((norms[~held], norms[held])):
            errors[i].append(float(part.sum()) / energy[i])
    return errors


def encode_rows(x: torch.Tensor, words: torch.Tensor, beam: int) -> torch.Tensor:
    """Codes in the precision of the rows, for training; ties may go either way.

    Args:
        x: float32 [N, D].
        words: float32 [R, K, D].
    Returns:
        int64 [N, R].
    """
    if beam == 1 and fused.available(x.device, x.shape[1]):
        return fused.encode(x, words)
    size = GPU_ROWS // beam if x.is_cuda else ENCODE_CHUNK
    parts = [beam_search(part[None], words[None], beam)[:, 0] for part in torch.split(x, size)]
    return torch.cat(parts)


def refit(x: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Codewords that fit the rows better under codes held fixed.

    Args:
        x: float32 [N, D], in the metric's space.
        weights: float32 [N], >= 0.
        codes: int64 [N, R].
        words: float32 [R, K, D].
    Returns:
        float32 [R, K, D]; the weighted squared error is never above that of ``words``.
    """
    stages = words.shape[0]
    stay = PSEUDO_COUNT * weights.mean().clamp(min=1e-12)

    def spread(delta: torch.Tensor) -> torch.Tensor:
        """What each row gets of codewords [R, K, D]."""
        out = torch.zeros_like(x)
        for r in range(stages):
            out += delta[r][codes[:, r]]
        return out

    def gather(rows: torch.Tensor) -> torch.Tensor:
        """The transpose of ``spread``, weighted."""
        return torch.stack([sum_rows(rows, codes[:, r], weights) for r in range(stages)])

    residual = gather(x - spread(words))
    counts = torch.stack([sum_rows(weights, codes[:, r]) for r in range(stages)])
    scale = 1 / (counts + stay)[..., None]  # Jacobi's preconditioner
    delta = torch.zeros_like(words)
    direction = scale * residual
    energy = (residual * direction).sum(dtype=torch.float64)
    for _ in range(STEPS):
        if not float(energy) > 0:
            break
        image = gather(spread(direction)) + stay * direction
        step = (energy / (direction * image).sum(dtype=torch.float64)).float()
        delta += step * direction
        residual -= step * image
        moved = scale * residual
        before, energy = energy, (residual * moved).sum(dtype=torch.float64)
        direction = moved + (energy / before).float() * direction
    return words + delta

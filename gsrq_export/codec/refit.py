"""Least squares over all stages of a residual codebook at once.

Stage-wise clustering fits each stage to what the greedy codes before it left. With the codes held fixed, the best
codewords of all stages together solve min sum_i w_i ||x_i - sum_r c_r[code_ir]||^2: a sparse linear problem, which
conjugate gradients solve from the present codewords without forming its matrix. (The codebook update of additive
and residual quantizers: Martinez et al., "Revisiting additive quantization", ECCV 2016.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gsrq_export.codec import fused
from gsrq_export.codec.cluster import GPU_ROWS, sum_rows
from gsrq_export.codec.codebook import ENCODE_CHUNK, Codebook, beam_search
from gsrq_export.codec.rows import Rows, whole

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
    of = None if weights is None else [weights]
    return refit_parts(book, [vectors], of, beam, rounds, whole(len(vectors)))


def refit_parts(
    book: Codebook,
    vectors: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None,
    beam: int,
    rounds: int,
    rows: Rows,
) -> tuple[Codebook, list[float], list[float]]:
    """``refit_codebook`` of vectors in parts; every process gets the same codebook.

    Args:
        vectors: [n, groups * width], the parts here.
        weights: float32 [n, groups], of each.
    """
    device, here = vectors[0].device, range(len(vectors))
    words = book.codewords.to(device, copy=True)
    held = [held_out(len(part), device) for part in vectors]
    logs = []
    for g in range(book.groups):
        transform = book.transform[g].to(device).double()
        back = torch.linalg.inv(transform).T
        columns = slice(g * book.width, (g + 1) * book.width)
        x = [part[:, columns].float() @ transform.float().T for part in vectors]
        seen = [x[i][~held[i]] for i in here]
        w = [part.new_ones(len(part)) for part in seen]
        if weights is not None:
            w = [weights[i][:, g].to(device)[~held[i]] for i in here]
        stored = (words[g].double() @ transform.T).float()
        codes = [encode_rows(part, stored, beam) for part in x]
        best = _errors(x, stored, codes, held, rows)
        for _ in range(rounds):
            seen_codes = [codes[i][~held[i]] for i in here]
            fitted = (_fit(seen, w, seen_codes, stored, rows.without(HOLD_OUT)).double() @ back).half()
            stored = (fitted.double() @ transform.T).float()
            codes = [encode_rows(part, stored, beam) for part in x]
            found = _errors(x, stored, codes, held, rows)
            if found[1][-1] < best[1][-1]:
                best = found
                words[g] = fitted
        logs.append(best)
    train, unseen = torch.tensor(logs).mean(0).tolist()
    return replace(book.to(device), codewords=words), train, unseen


def _errors(
    x: Sequence[torch.Tensor],
    words: torch.Tensor,
    codes: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    rows: Rows,
) -> list[list[float]]:
    """Relative squared error after each stage, of the training and of the held-out rows."""

    def sums(i: int) -> torch.Tensor:
        left = x[i]
        found = []
        for r in range(len(words) + 1):
            norms = (left.double() ** 2).sum(1)
            found.append(torch.stack([norms[~held[i]].sum(), norms[held[i]].sum()]))
            if r < len(words):
                left = left - words[r][codes[i][:, r]]
        return torch.stack(found, 1)

    energies: list[list[float]] = rows.total(sums).tolist()
    return [[error / (energy[0] or 1.0) for error in energy[1:]] for energy in energies]


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
    return _fit([x], [weights], [codes], words, whole(len(x)))


def _fit(
    x: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    words: torch.Tensor,
    rows: Rows,
) -> torch.Tensor:
    """``refit`` of rows in parts."""
    stages = words.shape[0]
    stay = PSEUDO_COUNT * (rows.total(lambda i: weights[i].sum()) / rows.count).clamp(min=1e-12)

    def spread(delta: torch.Tensor, i: int) -> torch.Tensor:
        """What each row of a part gets of codewords [R, K, D]."""
        out = torch.zeros_like(x[i])
        for r in range(stages):
            out += delta[r][codes[i][:, r]]
        return out

    def gather(part: torch.Tensor, i: int) -> torch.Tensor:
        """The transpose of ``spread``, weighted."""
        return torch.stack([sum_rows(part, codes[i][:, r], weights[i]) for r in range(stages)])

    def there_and_back(delta: torch.Tensor, i: int) -> torch.Tensor:
        return gather(spread(delta, i), i)

    residual = rows.total(lambda i: gather(x[i] - spread(words, i), i))
    counts = rows.total(lambda i: torch.stack([sum_rows(weights[i], codes[i][:, r]) for r in range(stages)]))
    scale = 1 / (counts + stay)[..., None]  # Jacobi's preconditioner
    delta = torch.zeros_like(words)
    direction = scale * residual
    energy = (residual * direction).sum(dtype=torch.float64)
    for _ in range(STEPS):
        if not float(energy) > 0:
            break
        image = rows.total(partial(there_and_back, direction)) + stay * direction
        step = (energy / (direction * image).sum(dtype=torch.float64)).float()
        delta += step * direction
        residual -= step * image
        moved = scale * residual
        before, energy = energy, (residual * moved).sum(dtype=torch.float64)
        direction = moved + (energy / before).float() * direction
    return words + delta

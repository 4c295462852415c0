"""How a finished codebook codes held-out vectors: error by stage, KV head and position; which codewords it uses."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.codebook import ENCODE_CHUNK, Codebook
from gsrq_export.codec.refit import HOLD_OUT, held_out
from gsrq_export.errors import GsrqError

FIRST_BUCKET = 16  # positions in the first bucket; each further one ends at twice the position


@dataclass(frozen=True)
class PositionError:
    """Relative squared error of the held-out tokens at positions start .. stop - 1 of their sequence."""

    start: int
    stop: int
    vectors: int
    error: float


@dataclass(frozen=True)
class Profile:
    """Errors are squared, over the energy of the same elements: 0 is exact, 1 is coding nothing.

    Attributes:
        vectors: held-out tokens measured.
        beam: candidates a stage that the encoder kept.
        by_stage: error of the sum of the first 1, 2, ... R codewords.
        metric_by_stage: the same in the codebook's metric, which is what the encoder minimises.
        by_head: error of each KV head's elements after the last stage.
        by_position: the same by position in the sequence; buckets that hold no held-out token are left out.
        used_by_stage: share of the 256 codewords that occur, mean over sub-vectors; few vectors cannot use all.
        entropy_by_stage: of the codewords in bits, 8 at most, mean over sub-vectors.
        top_share_by_stage: share of the vectors that the most used codeword takes, largest over sub-vectors.
    """

    vectors: int
    beam: int
    by_stage: list[float]
    metric_by_stage: list[float]
    by_head: list[float]
    by_position: list[PositionError]
    used_by_stage: list[float]
    entropy_by_stage: list[float]
    top_share_by_stage: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """What ``to_dict`` gave; TypeError or KeyError where fields are missing or unknown."""
        return cls(**{**data, "by_position": [PositionError(**entry) for entry in data["by_position"]]})


@torch.no_grad()
def profile_codebook(
    codebook: Codebook,
    vectors: torch.Tensor,
    sequence_length: int,
    num_kv_heads: int,
    beam: int = 1,
    positions: torch.Tensor | None = None,
) -> Profile:
    """Code the held-out rows (every ``HOLD_OUT``-th, as in training) and measure.

    Args:
        vectors: [N, groups * width], keys or values of one layer.
        sequence_length: tokens of a sequence.
        num_kv_heads: heads that a row concatenates.
        beam: of the encoder.
        positions: int [N], the rows' places in their sequences; None: they are whole sequences, one after the other.
    Raises:
        GsrqError: no such vectors, not as many positions or no whole sequences, none held out, or one not finite.
    """
    rows, elements = vectors.shape
    if elements != codebook.groups * codebook.width or elements % num_kv_heads:
        raise GsrqError(
            f"vectors of {elements} elements: the codebook codes {codebook.groups * codebook.width}, "
            f"for {num_kv_heads} KV heads",
            "profile a codebook on the layer and kind that it was trained for",
        )
    if positions is None and sequence_length > 0 and rows % sequence_length == 0:
        positions = torch.arange(rows) % sequence_length
    if positions is None or len(positions) != rows or rows < HOLD_OUT:
        raise GsrqError(
            f"{rows} vectors: need whole sequences of sequence_length {sequence_length}, {HOLD_OUT} vectors at least",
            "give the captured vectors and the traffic.sequence_length that they were captured with",
        )
    index = held_out(rows, vectors.device).nonzero().flatten()
    held = vectors[index]
    if not bool(torch.isfinite(held).all()):
        raise GsrqError("vectors hold NaN or infinity", "check the model's weights and dtype, and capture again")

    parts = [_measure(codebook, part, num_kv_heads, beam) for part in torch.split(held, ENCODE_CHUNK)]
    stage_error, stage_energy, counts = (torch.stack([part[i] for part in parts]).sum(0) for i in range(3))
    error, energy = (torch.cat([part[i] for part in parts]) for i in (3, 4))  # [M, KV]
    by_stage, metric_by_stage = (_relative(stage_error[i], stage_energy[i]).tolist() for i in range(2))

    position = positions.to(index.device)[index]
    by_position, start = [], 0
    while start < sequence_length:
        stop = min(2 * start or FIRST_BUCKET, sequence_length)
        inside = (position >= start) & (position < stop)
        if count := int(inside.sum()):
            left = float(_relative(error[inside].sum(), energy[inside].sum()))
            by_position.append(PositionError(start, stop, count, left))
        start = stop

    share = counts / len(held)  # [G, R, 256]
    return Profile(
        vectors=len(held),
        beam=beam,
        by_stage=by_stage,
        metric_by_stage=metric_by_stage,
        by_head=_relative(error.sum(0), energy.sum(0)).tolist(),
        by_position=by_position,
        used_by_stage=(counts > 0).double().mean(2).mean(0).tolist(),
        entropy_by_stage=(torch.special.entr(share).sum(2).mean(0) / math.log(2)).tolist(),
        top_share_by_stage=share.amax((0, 2)).tolist(),
    )


def _measure(codebook: Codebook, vectors: torch.Tensor, num_kv_heads: int, beam: int) -> tuple[torch.Tensor, ...]:
    """Sums over rows [m, E] in float64: errors by stage [2, R] and energies [2, 1], plain and in the metric; uses of
    each codeword [G, R, 256]; and of each row the last stage's errors [m, KV] and energies [m, KV].
    """
    groups, stages, width = codebook.groups, codebook.stages, codebook.width
    x = vectors.float().reshape(-1, groups, width)
    code = (codebook.encode(vectors, beam).to(torch.int64) & 0xFF).reshape(-1, groups, stages)
    words, transform = codebook.codewords.float(), codebook.transform.double()
    group = torch.arange(groups, device=x.device)

    def energies(part: torch.Tensor) -> torch.Tensor:
        return torch.stack([(part**2).sum(), (torch.einsum("gij,ngj->ngi", transform, part) ** 2).sum()])

    decoded = torch.zeros_like(x)
    errors = []
    for r in range(stages):
        decoded += words[group, r, code[:, :, r]]
        left = x.double() - decoded
        errors.append(energies(left))
    counts = torch.zeros(groups, stages, CODEBOOK_SIZE, dtype=torch.float64, device=x.device)
    counts.scatter_add_(2, code.permute(1, 2, 0), torch.ones_like(code.permute(1, 2, 0), dtype=torch.float64))
    by_head = [(part.reshape(len(x), num_kv_heads, -1) ** 2).sum(2) for part in (left, x.double())]
    return torch.stack(errors, 1), energies(x.double())[:, None], counts, *by_head


def _relative(error: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """error / energy; where there is no energy, 0 stands for no error."""
    return error / torch.where(energy > 0, energy, torch.ones_like(energy))

"""A residual codebook: what the exporter stores, and the plain encoder and decoder every kernel is held to.

One codebook codes the concatenated KV heads of a token (keys or values of one layer). The vector of
``groups * width`` elements is cut into ``groups`` sub-vectors; each is coded by ``stages`` residual
stages of 256 codewords, one byte a stage (the paper's section on residual quantization).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gsrq_export.cache.rule import CODEBOOK_SIZE, code_run
from gsrq_export.errors import GsrqError

MOST_PASSES = 16  # minima taken one by one; more are sorted
ENCODE_CHUNK = 4096  # rows encoded at once; codes do not depend on it, memory does


@dataclass(frozen=True)
class Codebook:
    """Codewords and the metric in which they are chosen.

    Attributes:
        codewords: float16 [groups, stages, 256, width]. A vector is the sum of one codeword a stage.
        transform: float32 [groups, width, width]. Codes minimise ||transform @ (x - codeword)||;
            the identity gives plain squared error.
        center: float32 [groups * width], of keys in the rotated frame (cache/frame.py): what is taken off them before
            RoPE. None: vectors are coded as they are. ``encode`` and ``decode`` are of vectors in the frame.
    """

    codewords: torch.Tensor
    transform: torch.Tensor
    center: torch.Tensor | None = None

    def __post_init__(self) -> None:
        words, transform = self.codewords, self.transform
        if words.ndim != 4 or words.shape[2] != CODEBOOK_SIZE or words.dtype != torch.float16:
            raise GsrqError(
                f"codewords must be float16 [groups, stages, {CODEBOOK_SIZE}, width], "
                f"not {words.dtype} {list(words.shape)}"
            )
        groups, _, _, width = words.shape
        if transform.shape != (groups, width, width) or transform.dtype != torch.float32:
            raise GsrqError(
                f"transform must be float32 {[groups, width, width]}, not {transform.dtype} {list(transform.shape)}"
            )
        center = self.center
        if center is not None and (center.shape != (groups * width,) or center.dtype != torch.float32):
            raise GsrqError(f"center must be float32 {[groups * width]}, not {center.dtype} {list(center.shape)}")
        for name, tensor in (("codewords", words), ("transform", transform), ("center", center)):
            if tensor is None:
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise GsrqError(
                    f"{name}: {bad} of {tensor.numel()} entries are NaN or infinite",
                    "calibrate again; the file is damaged or the model's activations overflow float16",
                )

    @property
    def groups(self) -> int:
        return int(self.codewords.shape[0])

    @property
    def stages(self) -> int:
        return int(self.codewords.shape[1])

    @property
    def width(self) -> int:
        return int(self.codewords.shape[3])

    @property
    def code_bytes(self) -> int:
        """Bytes a token's codes take."""
        return self.groups * self.stages

    def code_run(self, head_dim: int, by_head: bool) -> int:
        """Bytes of a token's codes that lie together in the cache, see cache/rule.py."""
        return code_run(self.groups, self.stages, self.width, head_dim, by_head)

    @property
    def nominal_bits(self) -> float:
        """Bits an element, codes alone: 8 R / D."""
        return 8 * self.stages / self.width

    @property
    def stored_bytes(self) -> int:
        """Bytes the codebook takes as stored."""
        center = 0 if self.center is None else self.center.numel()
        return self.codewords.numel() * 2 + (self.transform.numel() + center) * 4

    def to(self, device: torch.device | str) -> Codebook:
        words, transform = self.codewords.to(device), self.transform.to(device)
        center = None if self.center is None else self.center.to(device)
        if words is self.codewords and transform is self.transform and center is self.center:
            return self  # a new one would read every codeword to check it, at each decoding step
        return Codebook(words, transform, center)

    def first_stages(self, stages: int) -> Codebook:
        """The codebook of the first stages; after greedy training what a training of so many would have given."""
        return replace(self, codewords=self.codewords[:, :stages].contiguous())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes to vectors.

        Args:
            codes: int8 or uint8 [..., groups * stages]; byte g * stages + r is stage r of sub-vector g.
        Returns:
            float32 [..., groups * width].
        """
        index = (codes.to(torch.int64) & 0xFF).reshape(-1, self.groups, self.stages)
        words = self.codewords.float()
        group = torch.arange(self.groups, device=codes.device)
        out = torch.zeros(index.shape[0], self.groups, self.width, device=codes.device)
        for r in range(self.stages):
            out += words[group, r, index[:, :, r]]
        return out.reshape(*codes.shape[:-1], self.groups * self.width)

    def encode(self, vectors: torch.Tensor, beam: int = 1) -> torch.Tensor:
        """Vectors to codes, by beam search over the stages in float64.

        float64 makes the choice that of exact arithmetic for all but astronomically rare ties, so
        that any implementation that decides close calls exactly gives identical codes, however the
        input is split. Ties go to the lower beam entry, then the lower code.

        Args:
            vectors: [..., groups * width], finite.
            beam: candidates kept a stage; 1 is greedy.
        Returns:
            int8 (the byte's bit pattern) [..., groups * stages].
        """
        if vectors.shape[-1] != self.groups * self.width:
            raise ValueError(
                f"vectors have {vectors.shape[-1]} elements, the codebook codes {self.groups * self.width}"
            )
        transform = self.transform.double()
        # [G, R, K, D]: the codewords in the space where distance is Euclidean.
        words = torch.einsum("gij,grkj->grki", transform, self.codewords.double())
        flat = vectors.reshape(-1, self.groups, self.width)
        parts = [
            beam_search(torch.einsum("gij,ngj->gni", transform, part.double()), words, beam)
            for part in torch.split(flat, ENCODE_CHUNK)
        ]
        codes = torch.cat(parts) if parts else flat.new_zeros(0, self.groups, self.stages, dtype=torch.int64)
        bytes_ = torch.where(codes > 127, codes - 256, codes).to(torch.int8)
        return bytes_.reshape(*vectors.shape[:-1], self.code_bytes)


@dataclass(frozen=True)
class LayerCodebooks:
    """The codebooks of one layer."""

    keys: Codebook
    values: Codebook

    def __post_init__(self) -> None:
        if self.values.center is not None:
            raise GsrqError("the codebook of values has a center, which only keys have", "calibrate again")

    def to(self, device: torch.device | str) -> LayerCodebooks:
        return LayerCodebooks(self.keys.to(device), self.values.to(device))


def beam_search(target: torch.Tensor, words: torch.Tensor, beam: int) -> torch.Tensor:
    """Codes of the best path found, both arguments in the space where distance is Euclidean.

    Args:
        target: [G, N, D], of the precision in which to compute.
        words: [G, R, K, D].
        beam: paths kept a stage.
    Returns:
        int64 [N, G, R]. Ties go to the lower beam entry, then the lower code.
    """
    groups, rows, width = target.shape
    stages, size = words.shape[1], words.shape[2]
    residual = target[:, :, None]  # [G, N, b, D]
    error = target.new_zeros(groups, rows, 1)  # up to the constant ||target||^2
    path = torch.zeros(groups, rows, 1, 0, dtype=torch.int64, device=target.device)
    for r in range(stages):
        stage = words[:, r]  # [G, K, D]
        gain = 2 * torch.einsum("gnbd,gkd->gnbk", residual, stage) - (stage**2).sum(-1)[:, None, None]
        candidates = (error[..., None] - gain).flatten(2)  # [G, N, b * K]
        keep = min(beam, candidates.shape[-1])
        order = _least(candidates, keep)
        error = candidates.gather(-1, order)
        parent, code = order // size, order % size
        chosen = torch.stack([stage[g][code[g]] for g in range(groups)])  # [G, N, keep, D]
        residual = residual.gather(2, parent[..., None].expand(-1, -1, -1, width)) - chosen
        path = torch.cat([path.gather(2, parent[..., None].expand(-1, -1, -1, r)), code[..., None]], -1)
    return path[:, :, 0].permute(1, 0, 2)


def _least(candidates: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the ``keep`` least along the last axis, in order; of equals the first is the less."""
    if keep > MOST_PASSES:
        return candidates.sort(dim=-1, stable=True).indices[..., :keep]
    found = [candidates.argmin(-1, keepdim=True)]
    if keep > 1:
        left = candidates.clone()
    while len(found) < keep:
        left.scatter_(-1, found[-1], float("inf"))
        found.append(left.argmin(-1, keepdim=True))
    return torch.cat(found, -1)

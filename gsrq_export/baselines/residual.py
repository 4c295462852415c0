"""Residual quantization with this project's codec: GSRQ as published, and the same pipeline with plain k-means.

GSRQ: arXiv 2607.01065. Keys are coded before RoPE; the KV heads of a token are concatenated and cut into sub-vectors
of ``width`` elements, each coded by ``stages`` bytes; training rows weigh log(1 + lambda * gradient norm). With
method "kmeans" only the clustering of a stage differs, so a comparison of the two is one of GSKM with k-means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from gsrq_export.baselines.base import CacheCodec, Method, Sample, check_divides
from gsrq_export.codec.cluster import Method as Clustering
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.refit import encode_rows
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.errors import GsrqError

SCORES = 1 << 24  # of float32 scores formed at once
NAMES = {"gskm": "GSRQ", "kmeans": "k-means RQ", "kmeans-spherical": "spherically seeded k-means RQ"}


class ResidualCodec(CacheCodec):
    """A residual codebook. Its transform is counted where it is not the identity, which nobody has to store.

    Codes are chosen in float32: they are those of ``Codebook.encode`` but for near ties, at a fraction of the time.
    """

    def __init__(self, codebook: Codebook, beam: int = 1) -> None:
        self.codebook, self.beam = codebook, beam
        self.center = codebook.center
        self.frame = "pre-rope" if codebook.center is None else "post-rope"
        identity = torch.eye(codebook.width, device=codebook.transform.device)
        self._plain = bool((codebook.transform == identity).all())

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        flat = vectors.flatten(1)
        book = self.codebook
        if self.beam > 1:
            x = flat.float().reshape(-1, book.groups, book.width).transpose(0, 1)
            seen = x if self._plain else x @ book.transform.transpose(1, 2)
            codes = [encode_rows(seen[g], words, self.beam) for g, words in enumerate(self._seen)]
            return book.decode(torch.cat(codes, 1)).reshape(vectors.shape)
        rows = max(1, SCORES // (book.groups * book.codewords.shape[2]))
        parts = [self._greedy(part.reshape(-1, book.groups, book.width)) for part in torch.split(flat, rows)]
        return torch.cat(parts).reshape(vectors.shape) if parts else vectors.clone()

    @cached_property
    def _stages(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each stage's codewords as decoded and in the metric's space, [G, 256, D], and -||codeword||^2 there."""
        stages = []
        for words in self.codebook.codewords.unbind(1):
            stored = words.float()
            seen = stored
            if not self._plain:
                seen = (words.double() @ self.codebook.transform.double().transpose(1, 2)).float()
            stages.append((stored, seen, -(seen**2).sum(2)[:, None]))
        return stages

    @cached_property
    def _seen(self) -> torch.Tensor:
        """Codewords in the metric's space, [G, R, 256, D]."""
        return torch.stack([seen for _, seen, _ in self._stages], 1)

    def _greedy(self, x: torch.Tensor) -> torch.Tensor:
        """[N, G, D] as decoded."""
        residual = x.float().transpose(0, 1)
        if not self._plain:
            residual = residual @ self.codebook.transform.transpose(1, 2)
        decoded = torch.zeros_like(residual)
        for stored, seen, bias in self._stages:
            scores = torch.baddbmm(bias, residual, seen.transpose(1, 2), alpha=2)
            index = scores.argmax(2, keepdim=True).expand_as(residual)
            residual = residual - seen.gather(1, index)
            decoded += stored.gather(1, index)
        return decoded.transpose(0, 1)

    def first_stages(self, stages: int) -> ResidualCodec:
        """The codec of the first stages alone; trained greedily, they do not know of those that follow."""
        return ResidualCodec(self.codebook.first_stages(stages), self.beam)

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.codebook.nominal_bits

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        book = self.codebook
        stored = (book.codewords,) if self._plain else (book.codewords, book.transform)
        return stored if book.center is None else (*stored, book.center)


@dataclass(frozen=True)
class Residual(Method):
    """``stages`` bytes for each ``width`` elements."""

    method: Clustering = "gskm"
    width: int = 128
    stages: int = 16
    iterations: int = 40

    def __post_init__(self) -> None:
        if self.method not in NAMES or min(self.width, self.stages, self.iterations) < 1:
            raise GsrqError(
                f"residual quantization: method {self.method!r}, width {self.width}, stages {self.stages}, "
                f"iterations {self.iterations}",
                f"method is one of {', '.join(NAMES)}, the others are at least 1",
            )

    @property
    def label(self) -> str:
        return f"{NAMES[self.method]} D{self.width} R{self.stages}"

    @property
    def gradient_width(self) -> int:
        return self.width

    def covers(self, other: Method) -> bool:
        return (
            isinstance(other, Residual) and other.stages <= self.stages and replace(other, stages=self.stages) == self
        )

    def narrowed(self, codec: CacheCodec) -> CacheCodec:
        assert isinstance(codec, ResidualCodec)
        return codec.first_stages(self.stages)

    def check_heads(self, num_kv_heads: int, head_dim: int) -> None:
        check_divides(self.width, num_kv_heads * head_dim, "width", f"elements of {num_kv_heads} KV heads")

    def fit(self, sample: Sample) -> CacheCodec:
        self.check_heads(sample.num_kv_heads, sample.head_dim)
        norms = sample.gradient_norms(self.width)
        weights = None if norms is None else gradient_weights(norms)
        training = Training(self.method, self.iterations, sample.seed)
        return ResidualCodec(train_codebook(sample.vectors.flatten(1), weights, self.width, self.stages, training)[0])

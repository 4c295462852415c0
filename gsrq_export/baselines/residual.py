"""Residual quantization with this project's codec: GSRQ as published, and the same pipeline with plain k-means.

GSRQ: arXiv 2607.01065. Keys are coded before RoPE; the KV heads of a token are concatenated and cut into sub-vectors
of ``width`` elements, each coded by ``stages`` bytes; training rows weigh log(1 + lambda * gradient norm). With
method "kmeans" only the clustering of a stage differs, so a comparison of the two is one of GSKM with k-means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrq_export.baselines.base import CacheCodec, Method, Sample
from gsrq_export.codec.cluster import Method as Clustering
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.errors import GsrqError

NAMES = {"gskm": "GSRQ", "kmeans": "k-means RQ", "kmeans-spherical": "spherically seeded k-means RQ"}


class ResidualCodec(CacheCodec):
    """A residual codebook. Its transform is counted where it is not the identity, which nobody has to store."""

    def __init__(self, codebook: Codebook, beam: int = 1) -> None:
        self.codebook, self.beam = codebook, beam
        identity = torch.eye(codebook.width, device=codebook.transform.device)
        self._plain = bool((codebook.transform == identity).all())

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        codes = self.codebook.encode(vectors.flatten(1), self.beam)
        return self.codebook.decode(codes).reshape(vectors.shape)

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.codebook.nominal_bits

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        book = self.codebook
        return (book.codewords,) if self._plain else (book.codewords, book.transform)


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

    def fit(self, sample: Sample) -> CacheCodec:
        norms = sample.gradient_norms(self.width)
        weights = None if norms is None else gradient_weights(norms)
        training = Training(self.method, self.iterations, sample.seed)
        return ResidualCodec(train_codebook(sample.vectors.flatten(1), weights, self.width, self.stages, training)[0])

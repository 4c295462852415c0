"""VQLLM: "Residual vector quantization for KV cache compression in large language model", A. Kumar, arXiv 2410.15704.

The vector of a token and head is divided by its standard deviation (stored, float16) and cut into groups of ``width``
channels: neighbours for values, for keys every (head_dim / width)-th channel. All groups of all heads share one
codebook a residual stage, seeded by k-means and then learned by exponential moving averages of the members' sums
and counts over batches. Keys are coded before RoPE. The paper's setting is 2048 entries (11 bits), 8 stages, width 32.
Its light fine-tuning of the model itself is left out: no method here changes the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gsrq_export.baselines.base import CacheCodec, Kind, Method, Sample, check_divides
from gsrq_export.codec.cluster import ROWS, nearest
from gsrq_export.errors import GsrqError

DECAY = 0.99
SMOOTHING = 1e-5
SEED_ITERATIONS = 10
SEED_ROWS = 100_000


def to_groups(x: torch.Tensor, width: int, kind: Kind) -> torch.Tensor:
    """[n, num_kv_heads, head_dim] -> [n, num_kv_heads, head_dim / width, width]."""
    n, heads, dim = x.shape
    if kind == "value":
        return x.reshape(n, heads, dim // width, width)
    return x.reshape(n, heads, width, dim // width).transpose(2, 3)


def from_groups(groups: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The inverse of ``to_groups``."""
    return (groups if kind == "value" else groups.transpose(2, 3)).flatten(2)


def scales(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each head's vector, rounded as stored; 1 where it is zero. [n, num_kv_heads, 1]."""
    deviation = x.std(-1, keepdim=True).half().float()
    return torch.where(deviation > 0, deviation, 1)


class VqllmCodec(CacheCodec):
    """Attributes: codewords: float16 [stages, entries, width], shared by all groups of all heads."""

    def __init__(self, codewords: torch.Tensor, kind: Kind) -> None:
        self.codewords, self.kind = codewords, kind

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        scale = scales(vectors)
        groups = to_groups(vectors / scale, self.codewords.shape[2], self.kind)
        target = groups.reshape(-1, groups.shape[-1])
        residual = target
        for words in self.codewords.float():
            residual = residual - words[nearest(residual, words)[0]]
        return from_groups((target - residual).reshape(groups.shape), self.kind) * scale

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        stages, entries, width = self.codewords.shape
        return math.log2(entries) * stages / width + 16 / head_dim

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codewords,)


def member_sums(x: torch.Tensor, index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum [size, D] and number [size] of the rows of each entry, in an order that is the same every time."""
    total, count = x.new_zeros(size, x.shape[1]), x.new_zeros(size)
    if x.device.type == "cpu":
        return total.index_add_(0, index, x), count.index_add_(0, index, torch.ones_like(x[:, 0]))
    for rows, of in zip(torch.split(x, ROWS), torch.split(index, ROWS), strict=True):
        member = torch.nn.functional.one_hot(of, size).to(x.dtype)
        total += member.T @ rows
        count += member.sum(0)
    return total, count  # not index_add_, whose atomics would not repeat to the bit


class EmaCodebook:
    """One stage: codewords [entries, D] as smoothed moving averages."""

    def __init__(self, seeds: torch.Tensor) -> None:
        self.words, self.total, self.count = seeds, seeds.clone(), torch.ones(len(seeds), device=seeds.device)

    def update(self, x: torch.Tensor, index: torch.Tensor) -> None:
        """One batch: averages move by 1 - DECAY; counts are smoothed so that an unused entry stays finite."""
        total, count = member_sums(x, index, len(self.words))
        self.total = DECAY * self.total + (1 - DECAY) * total
        self.count = DECAY * self.count + (1 - DECAY) * count
        mass = self.count.sum()
        smooth = (self.count + SMOOTHING) / (mass + len(self.words) * SMOOTHING) * mass
        self.words = self.total / smooth[:, None]


@dataclass(frozen=True)
class Vqllm(Method):
    """``stages`` codebooks of ``entries`` words of ``width`` elements; ``steps`` batches of ``batch`` groups."""

    entries: int = 256
    stages: int = 4
    width: int = 32
    steps: int = 200
    batch: int = 32_768

    def __post_init__(self) -> None:
        if min(self.entries - 1, self.stages, self.width, self.steps, self.batch) < 1:
            raise GsrqError(f"VQLLM: {self}", "entries is at least 2, the others at least 1")

    @property
    def label(self) -> str:
        return f"VQLLM {self.entries} x {self.stages}, width {self.width}"

    def covers(self, other: Method) -> bool:
        # Batches are drawn and stages learned in an order in which no stage knows of those after it.
        return isinstance(other, Vqllm) and other.stages <= self.stages and replace(other, stages=self.stages) == self

    def narrowed(self, codec: CacheCodec) -> CacheCodec:
        assert isinstance(codec, VqllmCodec)
        return VqllmCodec(codec.codewords[: self.stages], codec.kind)

    def check_heads(self, num_kv_heads: int, head_dim: int) -> None:
        check_divides(self.width, head_dim, "VQLLM width", "elements of a head")

    def fit(self, sample: Sample) -> CacheCodec:
        self.check_heads(sample.num_kv_heads, sample.head_dim)
        vectors = sample.vectors.float()
        x = to_groups(vectors / scales(vectors), self.width, sample.kind).reshape(-1, self.width)
        if len(x) < self.entries:
            raise GsrqError(f"{len(x)} calibration groups for {self.entries} entries", "calibrate on more text")
        generator = torch.Generator().manual_seed(sample.seed)

        def draw(count: int) -> torch.Tensor:
            return x[torch.randint(len(x), (count,), generator=generator).to(x.device)]

        residual = x[torch.randperm(len(x), generator=generator)[:SEED_ROWS].to(x.device)]
        stages = []
        for _ in range(self.stages):
            stages.append(EmaCodebook(_seed(residual, self.entries)))
            residual = residual - stages[-1].words[nearest(residual, stages[-1].words)[0]]
        for _ in range(self.steps):
            residual = draw(min(self.batch, len(x)))
            for stage in stages:
                index = nearest(residual, stage.words)[0]
                coded = stage.words[index]
                stage.update(residual, index)
                residual = residual - coded
        return VqllmCodec(torch.stack([stage.words for stage in stages]).half(), sample.kind)


def _seed(x: torch.Tensor, entries: int) -> torch.Tensor:
    """k-means from the first rows, which are in random order; an empty entry keeps its word."""
    words = x[:entries].clone()
    for _ in range(SEED_ITERATIONS):
        total, count = member_sums(x, nearest(x, words)[0], entries)
        words = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], words)
    return words

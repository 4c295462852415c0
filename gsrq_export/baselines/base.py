"""What a cache quantizer is here: a map from exact vectors to what attention sees, and what it stores for that.

A ``Method`` is a quantizer with its settings; ``fit`` gives the ``CacheCodec`` of one layer's keys or values.
To add one: a file with both, a row in methods.py, a test against its definition, a section in docs/baselines.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gsrq_export.cache.footprint import count
from gsrq_export.cache.rule import CacheRule
from gsrq_export.codec.residual import widened
from gsrq_export.errors import GsrqError
from gsrq_export.model.introspect import ModelSpec

Kind = Literal["key", "value"]
Frame = Literal["pre-rope", "post-rope"]


@dataclass(frozen=True)
class Sample:
    """Calibration vectors of one layer.

    Attributes:
        kind: keys or values.
        vectors: [N, num_kv_heads, head_dim]; keys in the frame that the method states.
        gradients: float32 [N, groups], the norm of the loss gradient of each of the equal, contiguous parts of
            a token's concatenated heads; None where the loss was not differentiated.
        seed: of everything that is drawn at random.
    """

    kind: Kind
    vectors: torch.Tensor
    gradients: torch.Tensor | None = None
    seed: int = 0

    @property
    def num_kv_heads(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.vectors.shape[2])

    def gradient_norms(self, width: int) -> torch.Tensor | None:
        """Gradient norms of parts of ``width`` elements: float32 [N, num_kv_heads * head_dim / width]."""
        if self.gradients is None:
            return None
        have = self.num_kv_heads * self.head_dim // self.gradients.shape[1]
        if width % have:
            raise GsrqError(
                f"gradient norms of {have} elements each do not add up to those of {width}",
                "capture with key_width and value_width that divide the method's width",
            )
        return widened(self.gradients, width // have)


class CacheCodec(ABC):
    """Codes one layer's keys or values.

    Attributes:
        frame: of keys, whether they are coded before or after RoPE; values have none.
        group_tokens: consecutive tokens that are coded together.
        center: float32 [num_kv_heads * head_dim], of keys coded after RoPE: taken off before it and added again after
            decoding, turned to each token's position; None for nothing.
    """

    frame: Frame = "pre-rope"
    group_tokens: int = 1
    center: torch.Tensor | None = None

    @abstractmethod
    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        """What attention sees in the place of ``vectors``.

        Args:
            vectors: float32 [n, num_kv_heads, head_dim], n consecutive coded tokens in whole groups.
        Returns:
            float32 of the same shape.
        """

    def reconstruct_heads(self, x: torch.Tensor) -> torch.Tensor:
        """The same of [B, num_kv_heads, n, head_dim], n tokens in whole groups: sequences may follow each other."""
        batch, heads, count, dim = x.shape
        seen = self.reconstruct(x.transpose(1, 2).reshape(batch * count, heads, dim))
        return seen.reshape(batch, count, heads, dim).transpose(1, 2)

    @abstractmethod
    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        """Bits stored for an element of a coded token: codes, scales, zero points and norms."""

    def shared_tensors(self) -> tuple[torch.Tensor, ...]:
        """What all tokens share (codebooks, rotations, static scales), at stored precision."""
        return ()

    @property
    def shared_bytes(self) -> int:
        return tensor_bytes(self.shared_tensors())


class Method(ABC):
    """A quantizer and its settings; a frozen dataclass, so that its fields identify a result."""

    frame: Frame = "pre-rope"

    @property
    @abstractmethod
    def label(self) -> str:
        """Name with the settings, such as "KIVI 2 bit, groups of 32"."""

    @property
    def gradient_width(self) -> int | None:
        """Elements of which it weighs gradient norms; None where it looks at no gradients."""
        return None

    def covers(self, other: Method) -> bool:
        """Whether a codec of ``other`` is a part of one of this method, so that one fit serves both."""
        return self == other

    def narrowed(self, codec: CacheCodec) -> CacheCodec:
        """This method's codec, out of one that was fitted by a method that covers it."""
        return codec

    def check_heads(self, num_kv_heads: int, head_dim: int) -> None:  # noqa: B027, most methods take any
        """Refuse a layer that the method cannot code, before anything is captured or fitted.

        Raises:
            GsrqError: its groups or sub-vectors do not divide the heads.
        """

    @abstractmethod
    def fit(self, sample: Sample) -> CacheCodec:
        """The codec of one layer's keys or values, its tensors on the sample's device.

        Raises:
            GsrqError: the method cannot code heads of this shape, or the sample is too small.
        """


@dataclass(frozen=True)
class LayerCodecs:
    """The codecs of one layer."""

    keys: CacheCodec
    values: CacheCodec


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the distinct tensors: one that several codecs hold counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def check_divides(part: int, whole: int, what: str, of: str) -> None:
    if part < 1 or whole % part:
        raise GsrqError(f"{what}: {part} does not divide the {whole} {of}", f"choose a divisor of {whole}")


def nominal_bits(spec: ModelSpec, codecs: Sequence[LayerCodecs]) -> float:
    """Bits that a coded token stores an element, scales and norms included: the mean over layers, keys and values."""
    bits = elements = 0.0
    for layer, pair in zip(spec.layers, codecs, strict=True):
        width = layer.num_kv_heads * layer.head_dim
        elements += 2 * width
        for codec in (pair.keys, pair.values):
            bits += width * codec.bits_per_element(layer.num_kv_heads, layer.head_dim)
    return bits / elements


def effective_bits(
    spec: ModelSpec, codecs: Sequence[LayerCodecs], rule: CacheRule, context: int, sequences: int = 1
) -> float:
    """Bits a key or value element, everything counted, for every method alike.

    Codes with their scales and norms, the exact buffer's slots in 16 bits, and, once over all sequences, what tokens
    share (``CacheCodec.shared_tensors``), over the elements of all tokens of all sequences.

    Args:
        context: tokens of each sequence.
        sequences: in the cache at once.
    """
    elements, bits = 0, 0.0
    shared: list[torch.Tensor] = []
    for layer, pair in zip(spec.layers, codecs, strict=True):
        width = layer.num_kv_heads * layer.head_dim
        elements += 2 * width
        for codec in (pair.keys, pair.values):
            bits += width * codec.bits_per_element(layer.num_kv_heads, layer.head_dim)
            shared += codec.shared_tensors()
    return count(rule, elements, bits, tensor_bytes(shared), context, sequences).effective_bits

"""What a model.onnx says about its cache, read from its metadata and signature."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsrq_export.cache.rule import CODE_TILE, CacheRule
from gsrq_export.errors import ArtifactError

OP_VERSION = "1"
VERSION_KEY, CACHE_KEY = "gsrq.op_version", "gsrq.cache"
PARTS = ("key_codes", "value_codes", "key_exact", "value_exact")
EXACT_TYPES = ("float16", "float32")  # numpy has no bfloat16
LIMIT = 1 << 24  # no size in the metadata is larger; a damaged file must not make us allocate


@dataclass(frozen=True)
class LayerShape:
    """One layer's cache.

    Attributes:
        layer_idx: the layer's index in the model.
        key_bytes, value_bytes: code bytes a token.
    """

    layer_idx: int
    num_kv_heads: int
    head_dim: int
    key_bytes: int
    value_bytes: int


@dataclass(frozen=True)
class CacheMetadata:
    """The cache that the graph's inputs ``past.{i}.*`` and outputs ``present.{i}.*`` hold.

    Attributes:
        max_length: most tokens of a sequence.
        exact_prefill: a call's own tokens are exact to each other (recipe ``prefill: exact``).
        exact_dtype: numpy name of the exact buffers' type.
        layers: layer ``i`` here is ``i`` in the tensors' names.
        codes_by_head: how stored codes are ordered, see cache/rule.py; every capacity is then a multiple of CODE_TILE,
            as every multiple of the block is.
    """

    rule: CacheRule
    max_length: int
    exact_prefill: bool
    exact_dtype: str
    layers: tuple[LayerShape, ...]
    codes_by_head: bool = False

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> CacheMetadata:
        """Parse and check an ONNX model's metadata_props.

        Raises:
            ArtifactError: absent, of another operator version, or out of range.
        """
        version = properties.get(VERSION_KEY)
        if version is None or CACHE_KEY not in properties:
            raise ArtifactError(
                f"model.onnx: no metadata {VERSION_KEY} and {CACHE_KEY}", "build the artifact with this program"
            )
        if version != OP_VERSION:
            raise ArtifactError(
                f"model.onnx: {VERSION_KEY} is {version!r}, this program runs {OP_VERSION!r}",
                "build the artifact again or use the program's matching version",
            )
        try:
            data = json.loads(properties[CACHE_KEY])
            rule = CacheRule(*(_size(data, name, least) for name, least in (("sinks", 0), ("window", 0), ("block", 1))))
            layers = tuple(
                LayerShape(_size(layer, "layer_idx", 0), *(_size(layer, name) for name in _LAYER_FIELDS))
                for layer in data["layers"]
            )
            max_length, prefill, dtype = _size(data, "max_length"), data["prefill"], data["exact_dtype"]
            order = data.get("code_order", "token")
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"model.onnx: bad {CACHE_KEY}: {error}", "build the artifact again") from error
        if prefill not in ("coded", "exact") or dtype not in EXACT_TYPES or not layers:
            raise ArtifactError(
                f"model.onnx: {CACHE_KEY} has prefill {prefill!r}, exact_dtype {dtype!r}, {len(layers)} layers",
                f"need prefill coded or exact, exact_dtype one of {', '.join(EXACT_TYPES)}, a layer or more",
            )
        if order not in ("token", "head") or (order == "head" and rule.block % CODE_TILE):
            raise ArtifactError(
                f"model.onnx: {CACHE_KEY} has code_order {order!r}, block {rule.block}",
                f"need code_order token, or head and a block that is a multiple of {CODE_TILE}",
            )
        return cls(rule, max_length, prefill == "exact", dtype, layers, order == "head")

    @property
    def full_capacity(self) -> int:
        """Coded tokens that a sequence of max_length needs room for; one block or several."""
        return max(self.rule.coded(self.max_length), self.rule.block)

    def shape(self, layer: int, part: str, batch: int, capacity: int) -> tuple[int, ...]:
        """Shape of past.{layer}.{part} for a batch and a capacity in coded tokens."""
        of = self.layers[layer]
        if part.endswith("codes"):
            return batch, capacity, of.key_bytes if part == "key_codes" else of.value_bytes
        return batch, of.num_kv_heads, self.rule.exact_slots, of.head_dim

    def dtype(self, part: str) -> str:
        """numpy name of a part's element type."""
        return "int8" if part.endswith("codes") else self.exact_dtype

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one sequence's cache with room for ``capacity`` coded tokens, all layers."""
        return sum(
            math.prod(self.shape(layer, part, 1, capacity)) * np.dtype(self.dtype(part)).itemsize
            for layer in range(len(self.layers))
            for part in PARTS
        )


_LAYER_FIELDS = ("num_kv_heads", "head_dim", "key_bytes", "value_bytes")


def _size(data: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = data[name]
    if type(value) is not int or not least <= value <= LIMIT:
        raise ValueError(f"{name} is {value!r}, not an integer in {least} .. {LIMIT}")
    return value

"""The artifact that a vLLM process serves, and what a page of vLLM's pool holds of its caches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from gsrq_export.cache.rule import CacheRule
from gsrq_export.errors import GsrqError
from gsrq_export.hosting.layers import ArtifactLayers, artifact_layers, refuse_rope
from gsrq_export.runtime.metadata import LayerShape

ENVIRONMENT = "GSRQ_ARTIFACT"
ALIGNMENT = 16  # bytes at which the kernels take the codes


@dataclass(frozen=True)
class Served:
    """An artifact, its layers, and the sizes that all layers of a pool must have in common.

    Attributes:
        token_bytes: of the codes of one token, in the layer that has the most.
    """

    directory: Path
    layers: ArtifactLayers

    @property
    def rule(self) -> CacheRule:
        return self.layers.metadata.rule

    @property
    def exact_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.layers.metadata.exact_dtype)
        return dtype

    @property
    def token_bytes(self) -> int:
        return max(_token_bytes(layer.shape) for layer in self.layers.layers)

    @property
    def block_multiple(self) -> int:
        """Tokens of a page are a multiple of this: whole blocks of the cache rule, aligned, and whole code tiles."""
        return math.lcm(self.rule.block, ALIGNMENT)

    def exact_bytes(self, shape: LayerShape) -> int:
        """Of a sequence's exact keys and values in one layer."""
        return 2 * shape.num_kv_heads * self.rule.exact_slots * shape.head_dim * self.exact_dtype.itemsize

    def exact_pages(self, page: int) -> int:
        """Pages of ``page`` tokens that hold a sequence's exact buffers, in the layer that needs the most."""
        return max(
            -(-self.exact_bytes(layer.shape) // (page * _token_bytes(layer.shape))) for layer in self.layers.layers
        )

    def pages(self, tokens: int, page: int) -> int:
        """Pages of a sequence: those of its exact buffers, then those of its coded tokens."""
        return self.exact_pages(page) - (-self.rule.coded(tokens) // page)

    def index(self, layer_name: str) -> int:
        """Which layer of the artifact a layer of vLLM's is, from its name (model.layers.3.self_attn.attn).

        Raises:
            GsrqError: the name has no number or several, or the artifact has no such layer.
        """
        numbers = [int(part) for part in layer_name.split(".") if part.isdigit()]
        known = {layer.shape.layer_idx: i for i, layer in enumerate(self.layers.layers)}
        if len(numbers) != 1 or numbers[0] not in known:
            raise GsrqError(
                f"vLLM's layer {layer_name!r} is none of the artifact's layers {sorted(known)}",
                "serve the model that the artifact was built from",
            )
        return known[numbers[0]]


def served_artifact() -> Served:
    """The artifact that the environment names, verified once a process.

    Raises:
        GsrqError: it names none, or its rotated keys cannot be turned back.
        ArtifactError: the artifact is not sound.
    """
    name = os.environ.get(ENVIRONMENT)
    if not name:
        raise GsrqError(f"{ENVIRONMENT} is not set", "let it name the artifact before vLLM starts")
    return _served(Path(name).resolve())


@lru_cache(maxsize=4)
def _served(directory: Path) -> Served:
    layers = artifact_layers(directory)
    refuse_rope(directory)
    return Served(directory, layers)


def _token_bytes(shape: LayerShape) -> int:
    return shape.key_bytes + shape.value_bytes

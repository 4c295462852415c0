"""An artifact's layers, ready for the torch operators: codebooks, rotary tables and attributes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.cache.reference import AttentionConfig
from gsrq_export.cache.rule import CODE_TILE, CacheRule
from gsrq_export.codec.codebook import LayerCodebooks
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.export.function import DOMAIN, OPERATOR
from gsrq_export.export.model import CODEBOOKS_FILE, MODEL_FILE
from gsrq_export.model.architecture import architecture_of
from gsrq_export.model.loading import load_config
from gsrq_export.runtime.metadata import CacheMetadata, LayerShape

REFUSED_ROPE = ("longrope", "dynamic")
TOLERANCE = 1e-4  # relative, of the scale
COS, SIN = 3, 4  # the operator's inputs
FIRST_CACHE = 7


@dataclass(frozen=True)
class ArtifactLayer:
    """One layer that owns a cache, counted from 0."""

    shape: LayerShape
    config: AttentionConfig
    books: LayerCodebooks
    cos: torch.Tensor  # [positions, rope_dim / 2]
    sin: torch.Tensor


@dataclass(frozen=True)
class ArtifactLayers:
    metadata: CacheMetadata
    layers: tuple[ArtifactLayer, ...]


def differences(
    layer: ArtifactLayer, kv_heads: int, head_dim: int, scale: float, softcap: float, sliding_window: int
) -> list[str]:
    """How a served layer's attention differs from what the artifact's codebooks were trained for; empty: not at all.

    Args:
        softcap, sliding_window: 0: none.
    """
    shape, config, found = layer.shape, layer.config, []
    if (kv_heads, head_dim) != (shape.num_kv_heads, shape.head_dim):
        found.append(f"{kv_heads} KV heads of {head_dim}, not {shape.num_kv_heads} of {shape.head_dim}")
    if abs(scale - config.scale) > TOLERANCE * config.scale:
        found.append(f"scale {scale:g}, not {config.scale:g}")
    if softcap != config.softcap:
        found.append(f"logit_cap {softcap or None}, not {config.softcap or None}")
    if sliding_window != config.sliding_window:
        found.append(f"sliding_window {sliding_window or None}, not {config.sliding_window or None}")
    return found


def refuse_rope(artifact: Path) -> None:
    """Refuse a model whose rotated keys cannot be turned back.

    Raises:
        GsrqError: naming the scaling.
    """
    scaling = architecture_of(load_config(artifact / "tokenizer")).rope_scaling
    if scaling and scaling.rope_type in REFUSED_ROPE:
        raise GsrqError(
            f"{artifact}: RoPE scaling {scaling.rope_type!r}: its tables change with the length of the text, so "
            "rotated keys cannot be turned back",
            "serve it with ONNX Runtime",
        )


@lru_cache(maxsize=4)
def artifact_layers(directory: Path) -> ArtifactLayers:
    """Verify an artifact and read what its attention needs; the model's weights are not loaded.

    Raises:
        ArtifactError: it is not sound, or its graph has not one attention node a layer.
    """
    verify_artifact(directory, deep=False)
    graph = onnx.load(str(directory / MODEL_FILE), load_external_data=False)
    metadata = CacheMetadata.from_properties({p.key: p.value for p in graph.metadata_props})
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    books = load_codebooks(directory / CODEBOOKS_FILE)
    nodes: dict[int, Any] = {}
    for node in graph.graph.node:
        if node.domain == DOMAIN and node.op_type == OPERATOR:
            nodes[int(node.input[FIRST_CACHE].split(".")[1])] = node
    if sorted(nodes) != list(range(len(metadata.layers))) or len(books) != len(nodes):
        raise ArtifactError(
            f"{directory}: {len(nodes)} attention nodes and {len(books)} codebooks for {len(metadata.layers)} layers",
            "build the artifact again",
        )
    found = []
    for i, shape in enumerate(metadata.layers):
        node = nodes[i]
        cos, sin = (_table(tensors[node.input[at]], directory) for at in (COS, SIN))
        found.append(ArtifactLayer(shape, _config(node), books[i], cos, sin))
    return ArtifactLayers(metadata, tuple(found))


def with_code_order(config: AttentionConfig, page: int) -> AttentionConfig:
    """The config with codes ordered by head where tiles fill blocks and pages, else by token.

    By head, the CUDA kernels read them in fewer, longer pieces. A server's cache lives in its process alone, so its
    order need not be the artifact's.

    Args:
        page: rows of codes of a page, or of a slot.
    """
    return replace(config, codes_by_head=page % CODE_TILE == 0 and config.rule.block % CODE_TILE == 0)


@cache
def torch_layer(directory: Path, index: int, heads: int, device: torch.device, page: int) -> CudaLayer:
    """The layer on a device, kept for as long as the process lives: graphs hold on to it by its number.

    Args:
        page: rows of codes of a page, or of a slot.
    Raises:
        GsrqError: see CudaLayer.
    """
    layer = artifact_layers(directory).layers[index]
    books, config = layer.books, with_code_order(layer.config, page)
    return CudaLayer(heads, layer.shape.head_dim, books.keys, books.values, layer.cos, layer.sin, config, device)


def _config(node: Any) -> AttentionConfig:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return AttentionConfig(
        scale=float(given["scale"]),
        rule=CacheRule(int(given["sinks"]), int(given["window"]), int(given["block"])),
        beam=int(given.get("beam", 1)),
        rope_interleaved=bool(given.get("rope_interleaved", 0)),
        exact_prefill=bool(given.get("exact_prefill", 0)),
        softcap=float(given.get("softcap", 0.0)),
        sliding_window=int(given.get("sliding_window", 0)),
        codes_by_head=bool(given.get("code_order", 0)),
    )


def _table(tensor: Any, directory: Path) -> torch.Tensor:
    """A float32 initializer. Outside data is read here: onnx refuses files with more than one hard link, which the
    artifact's are (its Triton repository has them too); verification has held their places to the directory."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    given = {entry.key: entry.value for entry in tensor.external_data}
    count = int(np.prod(tensor.dims))
    array = np.fromfile(directory / given["location"], np.dtype("<f4"), count, offset=int(given.get("offset", 0)))
    if tensor.data_type != onnx.TensorProto.FLOAT or array.size != count:
        raise ArtifactError(f"{directory}: {tensor.name} is not a whole float32 table", "build the artifact again")
    return torch.from_numpy(array.reshape(tuple(tensor.dims)))

"""Fits a method to every layer of a model, from what ``capture`` wrote."""

from __future__ import annotations

import torch

from gsrq_export.baselines.base import Kind, LayerCodecs, Method, Sample
from gsrq_export.cache.reference import rotate
from gsrq_export.capture import Captured
from gsrq_export.model.introspect import LayerSpec, ModelSpec


def layer_sample(
    captured: Captured,
    spec: ModelSpec,
    layer: LayerSpec,
    kind: Kind,
    method: Method,
    length: int,
    device: torch.device | str = "cpu",
) -> Sample:
    """A layer's calibration vectors in the method's frame.

    Args:
        captured: whole sequences of ``length`` tokens, with gradients.
    """
    vectors = captured.vectors(layer, kind).to(device).float().reshape(-1, layer.num_kv_heads, layer.head_dim)
    if kind == "key" and method.frame == "post-rope":
        cos, sin = (table[:length].to(device)[None] for table in spec.rope_tables[layer.rope_table])
        heads = vectors.reshape(-1, length, *vectors.shape[1:]).transpose(1, 2)
        vectors = rotate(heads, cos, sin, layer.rope_interleaved).transpose(1, 2).reshape(vectors.shape)
    return Sample(kind, vectors, captured.gradients(layer, kind).to(device))


def fit_model(
    captured: Captured, spec: ModelSpec, method: Method, length: int, device: torch.device | str = "cpu"
) -> list[LayerCodecs]:
    """The codecs of all layers, on ``device``; see ``layer_sample``."""
    return [
        LayerCodecs(
            method.fit(layer_sample(captured, spec, layer, "key", method, length, device)),
            method.fit(layer_sample(captured, spec, layer, "value", method, length, device)),
        )
        for layer in spec.layers
    ]

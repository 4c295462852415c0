"""Fits a method to every layer of a model, from what ``capture`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

from gsrq_export.baselines.base import Kind, LayerCodecs, Method, Sample
from gsrq_export.cache.frame import rotate
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
        captured: whole sequences of ``length`` tokens, with gradients where the method weighs by them.
    """
    vectors = captured.vectors(layer, kind).to(device).float().reshape(-1, layer.num_kv_heads, layer.head_dim)
    if kind == "key" and method.frame == "post-rope":
        cos, sin = (table[:length].to(device)[None] for table in spec.rope_tables[layer.rope_table])
        heads = vectors.reshape(-1, length, *vectors.shape[1:]).transpose(1, 2)
        vectors = rotate(heads, cos, sin, layer.rope_interleaved).transpose(1, 2).reshape(vectors.shape)
    gradients = captured.gradients(layer, kind).to(device) if method.gradient_width else None
    return Sample(kind, vectors, gradients)


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


def gradient_width(methods: Sequence[Method]) -> int | None:
    """The width at which norms must be captured to serve all methods; None where none of them looks at gradients."""
    widths = [method.gradient_width for method in methods if method.gradient_width]
    return gcd(*widths) if widths else None


def narrowed(method: Method, codecs: Sequence[LayerCodecs]) -> list[LayerCodecs]:
    """The method's codecs, out of those of a method that covers it."""
    return [LayerCodecs(method.narrowed(pair.keys), method.narrowed(pair.values)) for pair in codecs]


def families(methods: Sequence[Method]) -> list[list[Method]]:
    """The methods in groups of which the first covers the others: one fit a group. Order is kept otherwise."""
    found: list[list[Method]] = []
    for method in methods:
        home = next((f for f in found if f[0].covers(method) or method.covers(f[0])), None)
        if home is None:
            found.append([method])
        elif home[0].covers(method):
            home.append(method)
        else:
            home.insert(0, method)
    return found

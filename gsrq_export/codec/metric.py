"""The attention-aware metric: the distortion that a model feels, E[(q.(k - k^))^2] and ||W_o (v - v^)||^2.

Keys before RoPE meet queries under every rotation, so their metric is one scale a rotary pair, from the queries'
second moment. Values meet the output projection: the square root of the Gram matrix of its columns, summed
over the query heads of a KV head. Each is normalised to a mean square of one and floored, so it stays well conditioned.
"""

from __future__ import annotations

import torch

from gsrq_export.model.introspect import LayerSpec

FLOOR = 0.05  # of the largest eigenvalue of the square root


def key_transform(query_moment: torch.Tensor, layer: LayerSpec, rope_dim: int, width: int) -> torch.Tensor:
    """The metric of a layer's keys.

    Args:
        query_moment: float32 [num_kv_heads, head_dim], mean square of each query element over the group's heads.
        rope_dim: elements of a head that are rotated.
        width: elements of a sub-vector.
    Returns:
        float32 [groups, width, width], block diagonal over heads.
    """
    moment = query_moment.double().clone()
    half = rope_dim // 2
    pairs = (slice(0, rope_dim, 2), slice(1, rope_dim, 2))
    if not layer.rope_interleaved:
        pairs = (slice(0, half), slice(half, rope_dim))
    moment[:, pairs[0]] = moment[:, pairs[1]] = (moment[:, pairs[0]] + moment[:, pairs[1]]) / 2
    return _blocks(torch.diag_embed(moment.sqrt()), width)


def value_transform(output_weight: torch.Tensor, layer: LayerSpec, width: int) -> torch.Tensor:
    """The metric of a layer's values.

    Args:
        output_weight: [hidden, num_heads * head_dim], the output projection.
        width: elements of a sub-vector.
    Returns:
        float32 [groups, width, width], block diagonal over heads.
    """
    group = layer.num_heads // layer.num_kv_heads
    columns = output_weight.double().reshape(-1, layer.num_kv_heads, group, layer.head_dim)
    gram = torch.einsum("okgi,okgj->kij", columns, columns)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.transpose(1, 2)
    return _blocks(root, width)


def _blocks(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Per-head metrics [KV, d, d] to sub-vectors [groups, width, width]."""
    kv_heads, head_dim, _ = heads.shape
    values, vectors = torch.linalg.eigh(heads)
    values = values.clamp(min=FLOOR * float(values.max().clamp(min=1e-12)))
    heads = vectors * values[:, None] @ vectors.transpose(1, 2)
    whole = torch.block_diag(*heads)  # type: ignore[no-untyped-call]
    groups = kv_heads * head_dim // width
    out = torch.stack([whole[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)])
    scale = (out.diagonal(dim1=1, dim2=2) ** 2).mean().sqrt()
    return (out / scale).float().contiguous()

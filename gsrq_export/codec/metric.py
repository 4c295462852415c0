"""The attention-aware metric: the distortion that a model feels, E[(q.(k - k^))^2] and ||W_o (v - v^)||^2.

Keys before RoPE meet a query rotated by their distance, so their metric is the queries' second moment, rotated by and
averaged over distances: pairs that turn fast end as one scale each, pairs that hardly turn keep how they work together.
Values meet the output projection: the square root of the Gram matrix of its columns, summed over the query heads
of a KV head. Each is normalised to a mean square of one and floored, so it stays well conditioned.
"""

from __future__ import annotations

import torch

from gsrq_export.cache.reference import rotate
from gsrq_export.model.introspect import LayerSpec

FLOOR = 0.05  # of the largest eigenvalue of the square root
DISTANCES = 512  # sampled evenly over the table's positions


def key_transform(
    query_moment: torch.Tensor, layer: LayerSpec, table: tuple[torch.Tensor, torch.Tensor], width: int
) -> torch.Tensor:
    """The metric of a layer's keys.

    Args:
        query_moment: float32 [num_kv_heads, head_dim, head_dim], E[q q^T] before RoPE, over the group's heads.
        table: cos and sin, float32 [positions, rope_dim / 2]: distances 0 .. positions - 1 count alike.
        width: elements of a sub-vector.
    Returns:
        float32 [groups, width, width], block diagonal over heads.
    """
    rows = torch.linspace(0, len(table[0]) - 1, min(DISTANCES, len(table[0]))).round().long()
    cos, sin = (t[rows].double().cpu() for t in table)
    root = _root(query_moment.double().cpu())  # symmetric, so its rows are its columns
    moment = torch.zeros_like(root)
    for distance in range(len(rows)):
        c, s = (t[distance].expand(*root.shape[:2], -1) for t in (cos, sin))
        turned = rotate(root[:, None], c, s, layer.rope_interleaved)[:, 0]
        moment += turned.transpose(1, 2) @ turned
    return _blocks(_root(moment / len(rows)), width)


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
    return _blocks(_root(gram), width)


def _root(moment: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of positive semidefinite matrices [KV, d, d]."""
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.transpose(1, 2)
    return root


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

"""The frame in which keys are coded: before RoPE, or rotated to their position (recipe `codec.key_frame`).

In the rotated frame token t's coded vector is RoPE_t(k - m) with m the mean of the calibration keys before RoPE, and
attention sees decode(codes) + RoPE_t(m). A coded key is then never rotated: its score is a sum of R entries of a
table query x codewords, made once a step. Taking the mean off first leaves the codewords what differs between keys:
RoPE would smear it over all angles. Exact keys are the same in both frames, values have none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Coder = Callable[[torch.Tensor], torch.Tensor]  # keys or values [B, KV, T, d] to what attention sees in their place


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of the first 2 * cos.shape[-1] elements of each head.

    Args:
        x: [B, heads, L, head_dim].
        cos, sin: [B, L, rope_dim / 2].
        interleaved: pairs are (0, 1), (2, 3), ...; else (i, i + rope_dim / 2).
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rope, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rope[..., 0::2], rope[..., 1::2]) if interleaved else (rope[..., :half], rope[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated, rest], -1)


def turn_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """What ``rotate`` makes ``x`` of; its tables may be scaled by a constant."""
    size = cos**2 + sin**2
    return rotate(x, cos / size, -sin / size, interleaved)


def center_heads(center: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A codebook's center [KV * head_dim] as [1, KV, 1, head_dim], beside ``like`` [B, KV, L, head_dim]."""
    return center.to(like.device).reshape(1, like.shape[1], 1, like.shape[3])


def to_frame(
    keys: torch.Tensor, center: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """RoPE_t(k - m): what is coded in the place of keys, computed in float64 and rounded once.

    Args:
        keys: [B, KV, L, head_dim], before RoPE.
        center: float32 [KV * head_dim], the mean m.
        cos, sin: [B, L, rope_dim / 2] at the keys' positions.
        interleaved: see ``rotate``.
    Returns:
        float32, of the shape of ``keys``.
    """
    centred = keys.double() - center_heads(center, keys).double()
    return rotate(centred, cos.double(), sin.double(), interleaved).float()


def from_frame(
    decoded: torch.Tensor, center: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """decoded + RoPE_t(m): the keys after RoPE that attention sees, of ``decoded``'s type; else as ``to_frame``."""
    return decoded + rotate(center_heads(center, decoded).to(decoded.dtype).expand_as(decoded), cos, sin, interleaved)


def framed_coder(coder: Coder, center: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Coder:
    """A coder of vectors in the rotated frame, as one of keys before RoPE; in float32, differentiable where it is.

    Args:
        coder: of vectors RoPE_t(k - m).
        cos, sin: [positions, rope_dim / 2], from position 0 on. A model may scale both by a constant.
    Returns:
        What takes the keys of tokens 0 .. T - 1 and gives the keys before RoPE that attention sees as coded.
    """

    def code(keys: torch.Tensor) -> torch.Tensor:
        c, s = (table[None, : keys.shape[2]].to(keys.device) for table in (cos, sin))
        m = center_heads(center, keys)
        return turn_back(coder(rotate(keys - m, c, s, interleaved)), c, s, interleaved) + m

    return code

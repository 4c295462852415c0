"""The rotated frame against complex multiplication, both pairings, partial rotary embeddings and scaled tables."""

from __future__ import annotations

import pytest
import torch

from gsrq_export.cache.frame import framed_coder, from_frame, rotate, to_frame

BATCH, HEADS, LENGTH = 2, 3, 19


def material(head_dim: int, rope_dim: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Keys [B, KV, L, d], center, cos and sin of the positions, [L, rope_dim / 2]."""
    generator = torch.Generator().manual_seed(head_dim)
    angle = torch.arange(LENGTH)[:, None] * torch.logspace(0, -2, rope_dim // 2)
    keys = torch.randn(BATCH, HEADS, LENGTH, head_dim, generator=generator)
    return keys, torch.randn(HEADS * head_dim, generator=generator), scale * angle.cos(), scale * angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rope_dim", "scale"), [(6, 6, 1.0), (16, 4, 1.0), (10, 8, 1.3)])
def test_against_complex_numbers(head_dim: int, rope_dim: int, scale: float, interleaved: bool) -> None:
    keys, center, cos, sin = material(head_dim, rope_dim, scale)
    found = to_frame(keys, center, cos[None], sin[None], interleaved)
    assert found.dtype == torch.float32
    centerd = keys.double() - center.double().reshape(HEADS, 1, head_dim)
    half = rope_dim // 2
    first = [2 * p if interleaved else p for p in range(half)]
    second = [2 * p + 1 if interleaved else p + half for p in range(half)]
    turned = torch.complex(centerd[..., first], centerd[..., second]) * torch.complex(cos.double(), sin.double())
    expected = centerd.clone()
    expected[..., first], expected[..., second] = turned.real, turned.imag
    assert torch.equal(found, expected.float())
    # Back, with nothing lost: what attention sees is the key after RoPE.
    seen = from_frame(found, center, cos[None], sin[None], interleaved)
    torch.testing.assert_close(seen, rotate(keys, cos[None], sin[None], interleaved), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_coder_of_the_frame_stands_for_one_before_rope(interleaved: bool) -> None:
    keys, center, cos, sin = material(10, 8, 1.3)
    keys.requires_grad_()
    coder = framed_coder(lambda x: x.round() + (x - x.detach()), center, cos, sin, interleaved)
    seen = rotate(coder(keys), cos[None], sin[None], interleaved)
    framed = to_frame(keys.detach(), center, cos[None], sin[None], interleaved)
    torch.testing.assert_close(seen, from_frame(framed.round(), center, cos[None], sin[None], interleaved))
    weight = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((coder(keys) * weight).sum(), keys)
    torch.testing.assert_close(gradient, weight)  # straight-through: the identity, though turned and back


def test_shorter_sequences_take_the_first_positions() -> None:
    keys, center, cos, sin = material(6, 6, 1.0)
    coder = framed_coder(torch.round, center, cos, sin, False)
    assert torch.equal(coder(keys)[:, :, :7], coder(keys[:, :, :7]))

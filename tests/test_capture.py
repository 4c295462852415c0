"""Capture: what is recorded is what the model computes, and its gradients are the loss's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model

from gsrq_export.cache.frame import rotate
from gsrq_export.capture import (
    Captured,
    CaptureSettings,
    attend,
    capture,
    framed_keys,
    output_projections,
    training_vectors,
)
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import inspect_model


def test_capture_of_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, attention_bias=False) if family != "Qwen2" else tiny_model(family)
    model.requires_grad_(False)
    spec = inspect_model(model, 64)
    layer = spec.layers[1]
    total = layer.num_kv_heads * layer.head_dim
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    settings = CaptureSettings(total, layer.head_dim, batch=2)
    ticks: list[int] = []
    capture(model, spec, ids.numpy(), settings, tmp_path, ticks.append)
    assert ticks == [2, 1]
    got = Captured(tmp_path)
    keys, values = got.vectors(layer, "key"), got.vectors(layer, "value")
    assert keys.shape == values.shape == (60, total)
    assert got.gradients(layer, "key").shape == (60, 1)
    assert got.gradients(layer, "value").shape == (60, 2)
    assert got.query_moment(layer).shape == (2, layer.head_dim)

    # The gradient norm by finite differences: moving one value vector along its gradient changes the loss by the norm.
    norms = got.gradients(layer, "value").reshape(3, 20, 2)
    b, t, n = 1, 4, 1

    def loss(delta: torch.Tensor) -> float:
        def shifted(call: AttentionCall) -> torch.Tensor:
            value = call.value
            if call.layer_idx == layer.layer_idx:
                value = value.clone()
                value[b, n, t] += delta
            return attend(AttentionCall(**{**vars(call), "value": value}), spec)

        with torch.no_grad(), intercept(model, shifted):
            logits = model(input_ids=ids, use_cache=False).logits.double()
        return float(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        )

    step = 2e-2
    slopes = [(loss(step * e) - loss(-step * e)) / (2 * step) for e in torch.eye(layer.head_dim)]
    assert float(torch.tensor(slopes).norm()) == pytest.approx(float(norms[b, t, n]), rel=0.05, abs=1e-3)


def test_rotated_keys_keep_their_positions(tmp_path: Path) -> None:
    model = tiny_model("Llama").requires_grad_(False)
    spec = inspect_model(model, 64)
    layer = spec.layers[0]
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    parts = layer.head_dim // 2  # RoPE mixes the halves of a head
    for name, rotated in (("pre", False), ("rotated", True)):
        settings = CaptureSettings(parts, parts, batch=2, rotated_keys=rotated)
        (tmp_path / name).mkdir()
        capture(model, spec, ids.numpy(), settings, tmp_path / name)
    pre, got = Captured(tmp_path / "pre"), Captured(tmp_path / "rotated")
    assert got.positions().tolist() == 3 * list(range(20))
    keys = got.vectors(layer, "key")
    assert torch.equal(keys, pre.vectors(layer, "key"))
    vectors, center = training_vectors(got, spec, layer, "key", rotated_keys=True)
    assert center is not None
    torch.testing.assert_close(center, keys.float().mean(0))
    cos, sin = (t[None, :20] for t in spec.rope_tables[layer.rope_table])
    heads = (keys.float() - center).reshape(3, 20, layer.num_kv_heads, -1).transpose(1, 2)
    expected = rotate(heads, cos, sin, layer.rope_interleaved).transpose(1, 2).reshape(60, -1)
    torch.testing.assert_close(vectors, expected)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    some = framed_keys(keys[order], got.positions()[order], center, spec, layer)
    assert torch.equal(some, vectors[order])
    assert training_vectors(got, spec, layer, "value", rotated_keys=True)[1] is None
    # A head's gradient keeps its length; its halves' change.
    one, other = (c.gradients(layer, "key") for c in (pre, got))
    torch.testing.assert_close(one.reshape(60, -1, 2).norm(dim=2), other.reshape(60, -1, 2).norm(dim=2))
    assert not torch.allclose(one, other, rtol=0.05)
    assert torch.equal(pre.gradients(layer, "value"), got.gradients(layer, "value"))


def test_an_interrupted_capture_goes_on(tmp_path: Path) -> None:
    model = tiny_model("Llama").requires_grad_(False)
    spec = inspect_model(model, 64)
    ids = torch.randint(3, 97, (5, 12)).numpy()
    settings = CaptureSettings(64, 64, batch=2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    capture(model, spec, ids, settings, tmp_path / "a")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(model, spec, ids, settings, tmp_path / "b", stop)
    first = tmp_path / "b" / "shard-00000.safetensors"
    written = first.stat().st_mtime_ns
    capture(model, spec, ids, settings, tmp_path / "b")
    assert first.stat().st_mtime_ns == written
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_output_projections(family: str) -> None:
    model = tiny_model(family)
    found = output_projections(model, inspect_model(model, 32))
    expected = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    assert all(a is b for a, b in zip(found, expected, strict=True))

"""Capture: what is recorded is what the model computes, and its gradients are the loss's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model

from gsrq_export.capture import Captured, CaptureSettings, attend, capture, output_projections
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

"""Capture of a streamed model on a GPU, a layer there at a time, against the model in the GPU's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import STREAMED, write_checkpoint
from safetensors.torch import load_file

from gsrq_export.capture import CaptureSettings, capture
from gsrq_export.model.introspect import inspect_model
from gsrq_export.model.loading import load_model
from gsrq_export.model.streaming import load_streamed, streamed_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", STREAMED)
def test_captures_the_same(family: str, tmp_path: Path) -> None:
    directory = write_checkpoint(family, tmp_path / "model")
    whole, streamed = (load(directory)[0] for load in (load_model, load_streamed))
    spec = inspect_model(whole, 64)
    ids = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1)).numpy()
    half = spec.layers[0].head_dim // 2
    settings = CaptureSettings(half, half, batch=2, rotated_keys=True, vectors=100)
    weights = streamed_weights(streamed)
    assert weights is not None
    weights.place("cuda")
    for name, model in (("whole", whole.to("cuda")), ("streamed", streamed)):
        (tmp_path / name).mkdir()
        capture(model, spec, ids, settings, tmp_path / name)
    for number in range(3):
        want, got = (load_file(tmp_path / name / f"shard-0000{number}.safetensors") for name in ("whole", "streamed"))
        for name, tensor in want.items():
            torch.testing.assert_close(
                got[name], tensor, rtol=2e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    weights.place("cpu")
    assert torch.equal(inspect_model(streamed, 64).rope_tables[0][0], spec.rope_tables[0][0])

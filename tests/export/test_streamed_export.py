"""The export of a streamed model: the same bytes as of one in memory, whose weights pass in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from small_codes import RULE, codebooks

from gsrq_export.export.model import CODEBOOKS_FILE, MODEL_FILE, WEIGHTS_FILE, export_onnx
from gsrq_export.export.trace import ExportSettings
from gsrq_export.model.checkpoint import Checkpoint
from gsrq_export.model.introspect import inspect_model
from gsrq_export.model.loading import load_model
from gsrq_export.model.streaming import load_streamed


@pytest.mark.parametrize(("family", "layers"), [("Llama", 1), ("Gemma2", 2), ("Phi3", 1)])
def test_same_bytes(family: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3's are compared by tests/test_streamed_build.py."""
    directory = write_checkpoint(family, tmp_path / "model", num_hidden_layers=layers)
    whole, streamed = (load(directory)[0] for load in (load_model, load_streamed))
    spec, books = inspect_model(whole, 64), codebooks(whole)
    for name, model in (("whole", whole), ("streamed", streamed)):
        (tmp_path / name).mkdir()
        if name == "streamed":
            _only_small_reads(monkeypatch)
        export_onnx(model, spec, books, ExportSettings(RULE), tmp_path / name)
    for name in (MODEL_FILE, WEIGHTS_FILE, CODEBOOKS_FILE):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    assert all(p.is_meta for p in streamed.parameters())


def _only_small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than 1024 elements may only pass in parts."""
    read = Checkpoint.read

    def small(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        assert checkpoint.tensors[name].elements <= 1024, name
        return read(checkpoint, name)

    monkeypatch.setattr("gsrq_export.model.checkpoint.CHUNK_BYTES", 10_000)
    monkeypatch.setattr(Checkpoint, "read", small)

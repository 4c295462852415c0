"""codebooks.safetensors: round trip, determinism, and every kind of damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.storage import load_codebooks, save_codebooks, tensor_locations
from gsrq_export.errors import GsrqError


def layers(count: int = 3) -> list[LayerCodebooks]:
    generator = torch.Generator().manual_seed(0)

    def book(groups: int, stages: int, width: int) -> Codebook:
        words = torch.randn(groups, stages, 256, width, generator=generator).half()
        return Codebook(words, torch.randn(groups, width, width, generator=generator))

    found = [LayerCodebooks(book(1, 2, 6), book(3, 1 + i, 2)) for i in range(count)]
    center = torch.arange(6.0)
    found[1] = LayerCodebooks(replace(found[1].keys, center=center), found[1].values)  # of the rotated frame
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "codebooks.safetensors"
    save_codebooks(path, layers(), {f"key{i}": f"välue {i}" for i in range(9)})
    return path


def test_round_trip(saved: Path) -> None:
    for a, b in zip(load_codebooks(saved), layers(), strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert torch.equal(x.codewords, y.codewords)
            assert torch.equal(x.transform, y.transform)
            assert (x.center is None) is (y.center is None)
            assert x.center is None or y.center is None or torch.equal(x.center, y.center)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata() == {f"key{i}": f"välue {i}" for i in range(9)}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_equal_bytes_and_true_locations(saved: Path) -> None:
    data = saved.read_bytes()
    save_codebooks(saved, layers(), {f"key{i}": f"välue {i}" for i in reversed(range(9))})
    assert saved.read_bytes() == data
    tensors = load_file(saved)
    locations = tensor_locations(saved)
    assert set(locations) == set(tensors)
    for name, (offset, length) in locations.items():
        assert data[offset : offset + length] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(GsrqError, match=r"codebooks\.safetensors: not a readable safetensors file"):
        load_codebooks(saved)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(GsrqError, match="does not exist"):
        load_codebooks(tmp_path / "codebooks.safetensors")


def test_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "codebooks.safetensors"
    torch.save({"layers.0.key.codewords": torch.zeros(1)}, path)
    with pytest.raises(GsrqError, match="not a readable safetensors file"):
        load_codebooks(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.value.codewords", None, r"missing or unknown, such as layers\.1\.value\.codewords"),
        ("layers.7.key.codewords", torch.zeros(1), "missing or unknown, such as layers"),
        ("weights", torch.zeros(1), "missing or unknown, such as weights"),
        ("layers.0.key.codewords", torch.zeros(1, 2, 255, 6).half(), r"layers\.0\.key: codewords must be float16"),
        ("layers.0.key.codewords", torch.zeros(1, 2, 256, 6), r"not torch.float32"),
        ("layers.0.key.codewords", torch.zeros(1, 2, 256, 5).half(), r"layers\.0\.key: transform must be"),
        ("layers.0.value.transform", torch.eye(2).expand(4, 2, 2).contiguous(), r"layers\.0\.value: transform"),
        ("layers.2.value.codewords", torch.full((3, 3, 256, 2), torch.nan).half(), "4608 of 4608 entries are NaN"),
        ("layers.2.key.transform", torch.full((1, 6, 6), torch.inf), r"layers\.2\.key: transform: 36 of 36"),
        ("layers.0.value.center", torch.zeros(6), r"missing or unknown, such as layers\.0\.value\.center"),
        ("layers.1.key.center", torch.zeros(5), r"layers\.1\.key: center must be float32 \[6\]"),
        ("layers.1.key.center", torch.full((6,), torch.nan), r"layers\.1\.key: center: 6 of 6"),
    ],
)
def test_wrong_tensors(saved: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = {k: v.clone() for k, v in load_file(saved).items()}
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, saved)
    with pytest.raises(GsrqError, match=message):
        load_codebooks(saved)


def test_no_tensors(saved: Path) -> None:
    save_file({}, saved)
    with pytest.raises(GsrqError, match="no tensors"):
        load_codebooks(saved)


def test_header_that_reaches_outside(saved: Path) -> None:
    """Offsets past the end of the file are refused before anything is read."""
    data = saved.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["layers.2.value.transform"]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(GsrqError, match="not a readable safetensors file"):
        load_codebooks(saved)

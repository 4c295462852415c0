"""The rivals of the CUDA benchmark, as far as a CPU goes: what is absent is said, what is wrong is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPE = (3, 70, 8, 2, 32)  # batch, length, heads, kv_heads, head_dim


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "decode_rivals", raising=False)
    import decode_rivals

    return decode_rivals


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
    rows, keys, values = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(rows, keys, values, enable_gqa=True)[:, :, 0]


def once(calls: list[Callable[[], object]]) -> float:
    for call in calls:
        call()
    return 1.0


def test_a_right_rival_is_timed_and_an_absent_one_named(rivals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(rivals, "RIVALS", {"torch": sdpa, "FlashInfer": rivals.flashinfer})
    found = rivals.measure_rivals(SHAPE, once, "cpu")
    assert found["torch"]["ms"] == 1.0
    assert found["torch"]["relative_error"] < 1e-2
    assert "ModuleNotFoundError" in found["FlashInfer"]["absent"]


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_rival_is_refused(rivals: ModuleType, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def wrong(*tensors: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: sdpa(*tensors)() * factor

    monkeypatch.setattr(rivals, "RIVALS", {"wrong": wrong})
    with pytest.raises(SystemExit, match="wrong"):
        rivals.measure_rivals(SHAPE, once, "cpu")


def test_flex_attention_is_the_same_attention(rivals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)  # the arguments, not the compiler, are at issue
    tensors = rivals.inputs(*SHAPE, "cpu")
    got = rivals.flex_attention(*tensors)().double()
    for row in range(SHAPE[0]):
        expected = rivals.float64_output(*tensors, row)
        assert float((got[row] - expected).norm() / expected.norm()) < 1e-2

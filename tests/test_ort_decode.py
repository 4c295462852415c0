"""The decoder of benchmarks/ort_decode.py, small and on the CPU: its graphs against torch and against each other."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

from gsrq_export import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    native.ensure()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ort_decode

    return ort_decode


@pytest.fixture(autouse=True)
def _leave_no_modules() -> object:
    before = set(sys.modules)
    yield
    for name in {"ort_decode", "decoder_graph", "environment"} & (set(sys.modules) - before):
        del sys.modules[name]


def small(bench: ModuleType, **change: float) -> object:
    sizes = {"layers": 2, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp": 96, "vocab": 101}
    return bench.Decoder(**sizes, **change)


def runner(bench: ModuleType, path: Path, attention: str, rows: int = 3, length: int = 512) -> object:
    decoder = small(bench)
    made = bench.Runner(path, decoder, attention, bench.random_weights(decoder, torch.float32, "cpu"), length)
    made.allocate(rows, length)
    return made


def test_with_all_tokens_exact_the_graphs_agree(bench: ModuleType) -> None:
    assert bench.check_graphs_agree(small(bench), "cpu", torch.float32, 20) < 1e-5


@pytest.mark.parametrize("attention", ["gsrq", "rotated", "gqa"])
def test_a_step_equals_torch(bench: ModuleType, tmp_path: Path, attention: str) -> None:
    made = runner(bench, tmp_path, attention)
    coding = bench.RULE.sinks + bench.RULE.window + bench.RULE.coded(511) - 1
    for past, row in ((300, 0), (510, 1), (coding, 2)):
        assert bench.check_step(made, past, row) < 1e-4


@pytest.mark.parametrize("attention", ["gsrq", "rotated", "gqa"])
def test_the_check_refuses_another_model(bench: ModuleType, tmp_path: Path, attention: str) -> None:
    made = runner(bench, tmp_path, attention)
    made.decoder = replace(made.decoder, theta=10.0)  # of the reference; the graph has its tables
    with pytest.raises(SystemExit, match="logits"):
        bench.check_step(made, 300)


def test_codes_are_ordered_by_head(bench: ModuleType, tmp_path: Path) -> None:
    runner(bench, tmp_path, "rotated")
    nodes = [
        n for n in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node if n.domain == "ai.gsrq"
    ]
    assert [[a.i for a in node.attribute if a.name == "code_order"] for node in nodes] == [[1], [1]]


def test_the_coding_step_codes_a_block_and_the_plain_one_none(bench: ModuleType, tmp_path: Path) -> None:
    made = runner(bench, tmp_path, "gsrq", rows=2)
    before = made.cache["0.key_codes"].clone()
    made.step(510, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(made.cache["0.key_codes"], before)
    rule = bench.RULE
    coded = rule.coded(511)
    made.step(rule.sinks + rule.window + coded - 1, torch.zeros(2, dtype=torch.int64))
    changed = (made.cache["0.key_codes"] != before).any(-1).any(0).nonzero().flatten()
    assert changed.tolist() == list(range(coded - rule.block, coded))


def test_a_decoder_of_8_billion_has_their_weights(bench: ModuleType) -> None:
    shapes = bench.Decoder().matrices().values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 8_030_261_248


def test_sizes_of_a_row(bench: ModuleType, tmp_path: Path) -> None:
    for attention in ("gsrq", "rotated", "gqa"):
        directory = tmp_path / attention
        directory.mkdir()
        made = runner(bench, directory, attention)
        held = sum(t.numel() * t.element_size() for t in made.cache.values())
        assert held == 3 * made.row_bytes(512)

"""The harness on the demo model: what a row is, what is run again and what is refused."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from compare.small import LENGTH, SETTINGS, codebooks, subject
from rich.console import Console

from gsrq_export import GsrqError, coded
from gsrq_export.baselines.attention import baseline
from gsrq_export.baselines.base import effective_bits
from gsrq_export.baselines.calibrate import fit_model
from gsrq_export.baselines.methods import chosen
from gsrq_export.baselines.residual import Residual
from gsrq_export.capture import Captured
from gsrq_export.codec.int8 import KEY_SPREAD, stage_integers
from gsrq_export.compare.markdown import to_markdown
from gsrq_export.compare.run import run_comparison
from gsrq_export.compare.schema import load_comparison, save_comparison
from gsrq_export.compare.store import merge
from gsrq_export.compare.subject import Ours, Tokenizer
from gsrq_export.evaluate.fidelity import FidelitySettings
from gsrq_export.evaluate.suite import evaluate
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.stages.progress import LineReporter

QUIET = LineReporter(Console(file=StringIO()))


def nll(row: object) -> list[float]:
    return row.metrics["operator"]["perplexity"]["window_nll"]  # type: ignore[attr-defined,no-any-return]


def test_rows_are_what_they_say(tmp_path: Path) -> None:
    made, counted = subject(tmp_path)
    path = tmp_path / "compare.json"
    methods = {
        **chosen(["kivi-2", "gsrq-256x12"]),
        "gsrq-128x2": Residual("gskm", 128, 2, 1),
        "gsrq-128x1": Residual("gskm", 128, 1, 1),
    }
    log = StringIO()
    ours = Ours("ours", "ours: random", codebooks(6), beam=2)
    found = run_comparison(
        path, made, methods, [ours, ours.prefix(0.5)], ["coded", "exact"], LineReporter(Console(file=log))
    )
    ids = ["ours", "ours-p0.5", "kivi-2", "gsrq-128x2", "gsrq-128x1"]
    assert [(row.id, row.prefill) for row in found.rows] == [(id, p) for id in ids for p in ("coded", "exact")]
    assert [row.ours for row in found.rows] == [True] * 4 + [False] * 6
    assert [(entry.id, entry.reason) for entry in found.skipped] == [
        ("gsrq-256x12", "width: 256 does not divide the 128 elements of 2 KV heads")
    ]
    assert load_comparison(path) == found
    assert counted.widths == [128], "one capture, at the width that the methods weigh"
    assert log.getvalue().count("fitting") == 2, "one training for both rows of D128"

    # A rival's row is its own codecs, measured by hand.
    captured = Captured(tmp_path)
    codecs = fit_model(captured, made.spec, methods["gsrq-128x1"], LENGTH)
    with baseline(made.model, codecs, made.rule.cache_rule, spec=made.spec):
        alone = evaluate(TorchRunner(made.model), made.tokenizer, made.texts[0].content, SETTINGS)
    row = found.row("gsrq-128x1", "coded")
    assert row is not None
    assert row.metrics["operator"] == alone
    assert row.metrics["readme"]["recall"] is None
    assert row.setting == {"quantizer": "Residual", "method": "gskm", "width": 128, "stages": 1, "iterations": 1}
    assert row.effective_bits["8192x64"] == effective_bits(made.spec, codecs, made.rule.cache_rule, 8192, 64)
    assert row.nominal_bits == 8 / 128

    # Ours is what the coded cache shows; with exact prefill too, says test_attention.py.
    with coded(made.model, ours.layers, made.rule.cache_rule, beam=2, spec=made.spec):
        there = evaluate(TorchRunner(made.model), made.tokenizer, made.texts[0].content, SETTINGS)
    assert nll(found.row("ours", "coded")) == pytest.approx(there["perplexity"]["window_nll"], abs=2e-3)
    assert nll(found.row("ours", "coded")) != pytest.approx(nll(found.row("ours-p0.5", "coded")), abs=2e-3)
    half = found.row("ours-p0.5", "coded")
    assert half is not None
    assert half.nominal_bits == 8 * 2 / 64
    assert half.setting["keys"] == [[64, 2]]
    assert "gsrq-256x12" in to_markdown(found)


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    made, counted = subject(tmp_path / "captured")
    (tmp_path / "captured").mkdir()
    path = tmp_path / "compare.json"
    fp8, both = chosen(["fp8"]), chosen(["fp8", "int4"])
    stopped = run_comparison(path, made, fp8, [], ["coded"], QUIET, may_start=lambda: False)
    assert (list(stopped.unquantized), stopped.rows, counted.widths) == (["coded"], [], [])
    first = run_comparison(path, made, fp8, [], ["coded"], QUIET)
    assert counted.widths == [None], "nobody weighs by gradients"
    again = run_comparison(path, made, fp8, [], ["coded"], QUIET)
    assert again.rows == first.rows
    assert counted.widths == [None]
    more = run_comparison(path, made, both, [], ["coded"], QUIET)
    assert more.rows[:1] == first.rows
    assert [row.id for row in more.rows] == ["fp8", "int4"]
    exact = run_comparison(path, made, fp8, [], ["exact"], QUIET)
    assert exact.prefills == ["coded", "exact"]
    assert len(exact.rows) == 3

    other, _ = subject(tmp_path / "captured", window=9)
    content = path.read_bytes()
    with pytest.raises(GsrqError, match=r"of another protocol: rule\.window is 8 there, 9 here"):
        run_comparison(path, other, fp8, [], ["coded"], QUIET)
    with pytest.raises(GsrqError, match=r"row int4 was made with \{'bits': 4\}, now \{'bits': 3\}"):
        run_comparison(path, made, {"int4": type(both["int4"])(3)}, [], ["coded"], QUIET)
    with pytest.raises(GsrqError, match="mine: codebooks for 2 layers, but the model has 6"):
        run_comparison(path, made, {}, [Ours("ours", "mine", codebooks(6)[:2])], ["coded"], QUIET)
    assert path.read_bytes() == content


def test_a_method_that_cannot_be_fitted_is_reported(tmp_path: Path) -> None:
    made, _ = subject(tmp_path)
    wide = {"kivi-2-g64": chosen(["kivi-2-g64"])["kivi-2-g64"]}  # blocks of 32 do not hold groups of 64
    found = run_comparison(tmp_path / "compare.json", made, {**wide, **chosen(["fp8"])}, [], ["coded"], QUIET)
    assert [row.id for row in found.rows] == ["fp8"]
    assert "cache.block 32 is not a multiple of the 64 tokens" in found.skipped[0].reason


def test_parts_are_put_together(tmp_path: Path) -> None:
    made, _ = subject(tmp_path)
    names = ["fp8", "int4"]
    files = [tmp_path / f"{name}.json" for name in names]
    parts = [
        run_comparison(file, made, chosen([name]), [], ["coded"], QUIET)
        for name, file in zip(names, files, strict=True)
    ]
    together = merge([*files, files[0]])
    assert together.rows == [*parts[0].rows, *parts[1].rows]
    changed = parts[1].protocol.model_copy(update={"rule": parts[1].protocol.rule.model_copy(update={"sinks": 3})})
    save_comparison(files[1], parts[1].model_copy(update={"protocol": changed}))
    with pytest.raises(GsrqError, match=r"int4\.json is of another protocol: rule\.sinks is 3 there, 2 here"):
        merge(files)


def test_long_texts_are_tokenized_once() -> None:
    class Slow:
        calls = 0
        vocabulary = 5

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            self.calls += 1
            return [len(text), int(add_special_tokens)]

    slow = Slow()
    fast = Tokenizer(slow)
    long = "a" * 20_000
    for _ in range(3):
        fast.encode(long, add_special_tokens=False).append(7)
        assert fast.encode(long, add_special_tokens=True) == [20_000, 1]
        assert fast.encode("short", add_special_tokens=True) == [5, 1]
    assert fast.encode(long, add_special_tokens=False) == [20_000, 0]
    assert slow.calls == 2 + 3
    assert fast.vocabulary == 5


def test_prefix() -> None:
    made = codebooks(1)
    ours = Ours("ours", "mine", made)
    half = ours.prefix(0.5)
    assert torch.equal(half.layers[0].keys.codewords, made[0].keys.codewords[:, :2])
    assert ours.prefix(0.01).layers[0].values.stages == 1
    assert half.setting()["codebooks_sha256"] != ours.setting()["codebooks_sha256"]
    assert half.id == "ours-p0.5"
    for share in (0.0, 1.0):
        with pytest.raises(GsrqError, match="not a share of the stages"):
            ours.prefix(share)


def test_int8_codewords_are_a_row_of_their_own() -> None:
    made = codebooks(1)
    ours = Ours("ours", "mine", made, beam=2)
    row = ours.snapped()
    assert (row.id, row.beam) == ("ours-int8", 2)
    for snapped, pair in zip(row.layers, made, strict=True):
        integers, exponents = stage_integers(snapped.keys, KEY_SPREAD)
        unit = torch.exp2(exponents.float())[None, :, None, None]
        assert float(((integers * unit - pair.keys.codewords.float()) / unit).abs().max()) <= 0.5
        stage_integers(snapped.values)
    assert row.setting()["codebooks_sha256"] != ours.setting()["codebooks_sha256"]


def test_fidelity_of_every_row(tmp_path: Path) -> None:
    made, _ = subject(tmp_path)
    settings = replace(SETTINGS, fidelity=FidelitySettings(2, 64, 8))
    made = replace(made, texts=[replace(made.texts[0], settings=settings), made.texts[1]])
    found = run_comparison(tmp_path / "c.json", made, chosen(["fp8", "turboquant-1"]), [], ["coded", "exact"], QUIET)
    assert "fidelity" not in found.unquantized["coded"]["operator"]
    for prefill in ("coded", "exact"):
        good, bad = (found.row(id, prefill) for id in ("fp8", "turboquant-1"))
        assert good is not None
        assert bad is not None
        near, far = (row.metrics["operator"]["fidelity"]["kl"]["mean"] for row in (good, bad))
        assert 0 <= near < 0.1 * far
        assert "fidelity" not in good.metrics["readme"]
    assert "kl operator" in to_markdown(found)

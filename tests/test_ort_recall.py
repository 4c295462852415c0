"""benchmarks/ort_recall.py on the CPU: an artifact beside itself, and beside a run that differs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "ort_recall", raising=False)
    import ort_recall

    return ort_recall


def run(hits: list[bool], nll: list[float], **more: Any) -> dict[str, Any]:
    rows = [{"tokens": 512, "hits": hits, "rate": sum(hits) / len(hits)}]
    perplexity = {"window_nll": nll, "perplexity": 2.0}
    metrics = {"perplexity": perplexity, "recall": {"lengths": rows}}
    return {"artifact": {"model.onnx": "1"}, "text": "2", "settings": {"lengths": (512,)}, "metrics": metrics} | more


def test_the_same_run_is_the_same(bench: ModuleType) -> None:
    one = run([True, False, True], [1.0, 2.0])
    found, refused = bench.compare(json.loads(json.dumps(one)), copy.deepcopy(one))
    assert found["same"]
    assert refused == []


def test_what_differs_is_refused(bench: ModuleType) -> None:
    one = run([True, False, True], [1.0, 2.0])
    found, refused = bench.compare(one, run([True, True, False], [1.0, 2.1]))
    assert not found["same"]
    assert len(refused) == 2
    _, refused = bench.compare(one, run([True, True, True], [1.0, 2.001]))
    assert refused == []
    assert bench.compare(one, run([True, False, True], [1.0, float("nan")]))[1]


def test_another_artifact_is_refused(bench: ModuleType) -> None:
    one = run([True], [1.0])
    with pytest.raises(SystemExit, match="artifact differs"):
        bench.compare(one, run([True], [1.0], artifact={"model.onnx": "other"}))

"""compare.json: written whole or not at all, read back equal, and refused when it is not what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare.constructed import comparison, evaluation, row
from pydantic import ValidationError

from gsrq_export import GsrqError
from gsrq_export.compare.schema import KIND, SCHEMA, SERVING, Comparison, load_comparison, save_comparison

EXACT = evaluation([2.0, 2.5], [True, True])


def sound() -> Comparison:
    return comparison([row("fp8", 8.0, EXACT), row("ours", 0.1 + 0.2, EXACT, ours=True)], EXACT)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out" / "compare.json"
    save_comparison(path, sound())
    assert load_comparison(path) == sound()
    data = json.loads(path.read_text())
    assert (data["kind"], data["schema"]) == (KIND, SCHEMA)
    assert data["rows"][1]["effective_bits"] == {
        "2048x1": 0.1 + 0.2,
        "8192x1": 0.1 + 0.2,
        "8192x64": 0.1 + 0.2,
        "131072x1": 0.1 + 0.2,
    }
    assert [p.name for p in path.parent.iterdir()] == ["compare.json"]


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    bad = comparison([row("fp8", 8.0, evaluation([2.0, float("nan")]))], EXACT)
    with pytest.raises(GsrqError, match=r"comparison\.rows\[0\]\.metrics\.novels\.perplexity\.\w+"):
        save_comparison(tmp_path / "compare.json", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_agrees_with_itself() -> None:
    rows = [row("fp8", 8.0, EXACT), row("fp8", 8.0, EXACT)]
    with pytest.raises(ValidationError, match="row fp8 with prefill coded stands twice"):
        comparison(rows, EXACT)
    with pytest.raises(ValidationError, match=r"metrics of \['wiki'\], the protocol names \['novels'\]"):
        comparison([rows[0].model_copy(update={"metrics": {"wiki": EXACT}})], EXACT)
    with pytest.raises(ValidationError, match="effective bits at"):
        comparison([rows[0].model_copy(update={"effective_bits": {"2048x1": 1.0}})], EXACT)
    with pytest.raises(ValidationError, match="was not measured with prefill exact"):
        Comparison.model_validate({**dict(sound()), "rows": [row("int4", 4.5, EXACT, prefill="exact")]})
    both = comparison([*sound().rows, row("fp8", 8.0, EXACT, prefill="exact")], EXACT)
    assert both.prefills == ["coded", "exact"]
    assert both.row("fp8", "exact") is both.rows[2]
    assert both.row("ours", "exact") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gsrq regression baseline"}, "is not a comparison"),
        ({"schema": "2.0"}, "has schema '2.0', this version reads 1.0"),
        ({"rows": [{"id": "fp8"}]}, r"rows\.0\.label: Field required"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_refusals(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "compare.json"
    save_comparison(path, sound())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(GsrqError, match=message):
        load_comparison(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(GsrqError, match="is not JSON"):
        load_comparison(path)
    with pytest.raises(GsrqError, match="No such file"):
        load_comparison(tmp_path / "none.json")


def test_serving_points() -> None:
    assert [point.key for point in SERVING] == ["2048x1", "8192x1", "8192x64", "131072x1"]

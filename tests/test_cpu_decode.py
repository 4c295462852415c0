"""benchmarks/cpu_decode.py on a small layer: rows of both orders of codes, and the table that is made of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gsrq_export import native

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_decode
    import tables

    yield cpu_decode, tables
    for name in {"cpu_decode", "tables"} & (set(sys.modules) - before):
        del sys.modules[name]


def measured(bench: ModuleType, rotated: bool) -> list[dict[str, Any]]:
    shape = bench.Shape("rotated" if rotated else "small", 4, 2, 64, 32, 3, rotated)
    return [asdict(row) for row in bench.measure(shape, 300, native.ensure(), 1, 1)]


def test_rows_of_both_orders_share_a_line(modules: tuple[ModuleType, ModuleType]) -> None:
    bench, tables = modules
    rows = [*measured(bench, False), *measured(bench, True)]
    assert [(row["shape"], row["code_order"]) for row in rows] == [
        *(("small", "head"), ("small", "token")),
        *(("rotated", "head"), ("rotated", "token")),
    ]
    assert all(0 <= row["max_error"] < bench.TOLERANCE for row in rows)
    head, rule, *lines = tables.decode({"rows": rows}).splitlines()
    assert head.endswith("| ours, codes by token, ms | keys before RoPE, ms |")
    assert rule.count("---") == 8
    assert len(lines) == 2
    for line, (by_head, by_token) in zip(lines, (rows[:2], rows[2:]), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[2], cells[6]) == (f"{by_head['gsrq_ms']:.2f}", f"{by_token['gsrq_ms']:.2f}")
        assert cells[7] == (f"{by_head['pre_rope_ms']:.2f}" if by_head["rotated"] else "")
    earlier = [{name: v for name, v in row.items() if name != "code_order"} for row in (rows[0], rows[2])]
    assert "by token" not in tables.decode({"rows": earlier})


def test_codes_in_another_order_than_the_nodes_are_refused(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = modules
    given = bench.attributes
    monkeypatch.setattr(
        bench, "attributes", lambda config, rotated: given(replace(config, codes_by_head=False), rotated)
    )
    with pytest.raises(SystemExit, match=r"ai\.gsrq is .* off its reference"):
        measured(bench, False)

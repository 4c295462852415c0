"""The verdict on constructed figures, each worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from compare.constructed import comparison, evaluation, row

from gsrq_export import GsrqError
from gsrq_export.compare.markdown import to_markdown, write_markdown
from gsrq_export.compare.metrics import metrics_of
from gsrq_export.compare.schema import SERVING, ServingPoint
from gsrq_export.compare.verdict import Verdict, difference_bounds, verdicts

NLL = [2.0, 2.5, 3.0, 2.2, 2.8, 2.4, 2.6, 2.1]
HITS = [True] * 20
EXACT = evaluation(NLL, HITS)


def shifted(by: float, missed: int = 0) -> dict[str, object]:
    """Each window worse by about ``by`` (a little uneven, so that there is a spread), and some cases missed."""
    nll = [x + by * (1 + 0.1 * (-1) ** i) for i, x in enumerate(NLL)]
    return evaluation(nll, [i >= missed for i in range(len(HITS))])


def of(found: list[Verdict], id: str, metric: str) -> Verdict:
    return next(v for v in found if v.row.id == id and v.metric.name == metric)


def test_rivals_with_as_many_bits_or_more_count() -> None:
    rows = [
        row("fp8", 8.0, shifted(0.001)),
        row("same", 1.0, shifted(0.2, 3)),
        row("cheap", 0.5, shifted(0.05, 3)),
        row("ours", 1.0, shifted(0.1, 1), ours=True),
    ]
    found = verdicts(comparison(rows, EXACT))
    assert [v.metric.name for v in found] == ["perplexity novels", "recall@512 novels"]
    perplexity = of(found, "ours", "perplexity novels")
    assert [a.rival.id for a in perplexity.dearer] == ["fp8", "same"]
    assert [a.at_least_as_good for a in perplexity.dearer] == [False, True]
    assert [a.statement for a in perplexity.dearer] == ["worse", "better"]
    assert not perplexity.holds
    assert [a.rival.id for a in perplexity.lost_to] == ["fp8"]
    assert [a.rival.id for a in perplexity.undercut_by] == ["cheap"]
    recall = of(found, "ours", "recall@512 novels")
    assert [a.at_least_as_good for a in recall.dearer] == [False, True]
    assert [a.statement for a in recall.dearer] == ["not distinguishable", "not distinguishable"]
    assert recall.undercut_by == []


def test_the_decision_is_not_rounded() -> None:
    tiny = 1e-13
    rows = [row("rival", 1.0, evaluation(NLL)), row("ours", 1.0, evaluation([x + tiny for x in NLL]), ours=True)]
    (verdict,) = verdicts(comparison(rows, evaluation(NLL)))
    assert not verdict.holds
    assert f"{verdict.dearer[0].ours:.9f}" == f"{verdict.dearer[0].theirs:.9f}"
    equal = [rows[0], row("ours", 1.0, evaluation(NLL), ours=True)]
    (verdict,) = verdicts(comparison(equal, evaluation(NLL)))
    assert verdict.holds
    assert verdict.dearer[0].statement == "not distinguishable"


def test_recall_is_decided_by_paired_cases() -> None:
    many = [True] * 60
    none = [False] * 60
    rows = [
        row("rival", 2.0, evaluation(NLL, none)),
        row("ours", 1.0, evaluation(NLL, many), ours=True),
        row("worse", 1.0, evaluation(NLL, none), ours=True),
        row("best", 2.0, evaluation(NLL, many)),
    ]
    found = verdicts(comparison(rows, EXACT))
    statements = {
        (v.row.id, a.rival.id): a.statement for v in found for a in v.dearer if v.metric.name.startswith("recall")
    }
    assert statements == {
        ("ours", "rival"): "better",
        ("ours", "best"): "not distinguishable",
        ("worse", "rival"): "not distinguishable",
        ("worse", "best"): "worse",
    }
    assert of(found, "ours", "recall@512 novels").holds
    assert not of(found, "worse", "recall@512 novels").holds


def test_bounds() -> None:
    ours, theirs = (metrics_of({"t": evaluation(x)})[0] for x in ([1.0, 2.0, 4.0], [0.5, 1.0, 2.5]))
    low, high = difference_bounds(ours, theirs) or (0.0, 0.0)
    half = 4.302653 * math.sqrt(0.25 / 3)  # t of 2 degrees at 0.975; differences .5, 1, 1.5
    assert (low, high) == pytest.approx((1 - half, 1 + half))
    one = metrics_of({"t": evaluation([1.0])})[0]
    assert difference_bounds(one, one) is None
    with pytest.raises(GsrqError, match="has 3 units"):
        difference_bounds(ours, one)


def test_modes_and_serving_points_are_kept_apart() -> None:
    dear = row("cq", 1.0, shifted(0.01))
    dear = dear.model_copy(update={"effective_bits": {p.key: 0.5 if p.sequences > 1 else 4.0 for p in SERVING}})
    rows = [dear, row("ours", 1.0, shifted(0.1), ours=True), row("fp8", 8.0, EXACT, prefill="exact")]
    made = comparison(rows, EXACT)
    shared, alone = (verdicts(made, ServingPoint(tokens=8192, sequences=n))[0] for n in (64, 1))
    assert (shared.dearer, [a.rival.id for a in shared.undercut_by]) == ([], ["cq"])
    assert shared.holds
    assert [a.rival.id for a in alone.lost_to] == ["cq"]
    with pytest.raises(GsrqError, match="serving point 7x1 was not counted"):
        verdicts(made, ServingPoint(tokens=7, sequences=1))


def test_tasks_are_compared_by_score() -> None:
    def with_task(scores: list[float]) -> dict[str, object]:
        task = {"task": "multi_key", "tokens": 256, "score": sum(scores) / len(scores), "case_scores": scores}
        return {**EXACT, "tasks": [task]}

    rows = [row("rival", 2.0, with_task([0.5, 0.75, 1.0])), row("ours", 1.0, with_task([0.5, 0.5, 1.0]), ours=True)]
    verdict = of(verdicts(comparison(rows, with_task([1.0, 1.0, 1.0]))), "ours", "multi_key@256 novels")
    assert [a.rival.id for a in verdict.lost_to] == ["rival"]
    assert verdict.dearer[0].statement == "not distinguishable"


def test_fidelity_has_a_direction_and_the_unquantized_model_has_none() -> None:
    def with_kl(values: list[float]) -> dict[str, object]:
        kl = {"mean": sum(values) / len(values), "interval": [min(values), max(values)], "per_prompt": values}
        return {**EXACT, "fidelity": {"prompts": 3, "kl": kl}}

    rows = [row("rival", 2.0, with_kl([0.2, 0.21, 0.22])), row("ours", 1.0, with_kl([0.1, 0.1, 0.11]), ours=True)]
    made = comparison(rows, EXACT)
    verdict = of(verdicts(made), "ours", "kl novels")
    assert verdict.holds
    assert verdict.dearer[0].statement == "better"
    unquantized = next(line for line in to_markdown(made).splitlines() if line.startswith("| unquantized"))
    assert unquantized.endswith("|  |")
    rows[0] = row("rival", 2.0, EXACT)
    with pytest.raises(GsrqError, match="row rival has no kl novels"):
        verdicts(comparison(rows, EXACT))


def test_markdown(tmp_path: Path) -> None:
    rows = [
        row("fp8", 8.0, shifted(0.001)),
        row("ours", 1.0, shifted(0.1, 1), ours=True),
        row("kivi-1", 1.5, shifted(0.9, 9)),
    ]
    made = comparison(rows, EXACT)
    write_markdown(tmp_path / "compare.md", made)
    text = (tmp_path / "compare.md").read_text()
    assert text == to_markdown(made)
    lines = text.splitlines()
    assert f"| unquantized | 16 | 16 | 16 | 16 | 16 | {math.exp(2.45):.3f} | 1.00 |" in lines
    order = [line.split("|")[1].strip() for line in lines if line.startswith(("| fp8:", "| **ours", "| kivi"))]
    assert order == ["fp8: FP8", "kivi-1: KIVI-1", "**ours: OURS**"]
    assert "| ours | perplexity novels | at least as good as 1 of 2 | fp8 (worse) | - |" in lines
    assert "| ours | recall@512 novels | at least as good as 1 of 2 | fp8 (not distinguishable) | - |" in lines

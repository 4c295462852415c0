"""Every gate broken on purpose, on figures whose outcome is known; the reports that come of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gsrq_export.errors import GsrqError
from gsrq_export.gate.baseline import KIND, Accepted, Baseline, Gates, Hits, Run, Settings, load_baseline, save_baseline
from gsrq_export.gate.gates import Measured, judge
from gsrq_export.gate.junit import junit_xml
from gsrq_export.gate.markdown import markdown
from gsrq_export.gate.verdict import GateReport, GateResult, Verdict

WINDOWS, CASES = 16, 100
RNG = np.random.default_rng(0)
EXACT = (3 + RNG.normal(0, 0.3, WINDOWS)).tolist()
CODED = [nll + 0.02 + noise for nll, noise in zip(EXACT, RNG.normal(0, 0.004, WINDOWS), strict=True)]
HASH = "0" * 64


def hits(wrong: int, of: int = CASES) -> str:
    return "0" * wrong + "1" * (of - wrong)


def baseline(**changes: Any) -> Baseline:
    fields: dict[str, Any] = {
        "kind": KIND,
        "schema_version": "1.0",
        "created_by": "test",
        "environment": {"python": "3"},
        "model_id": "m",
        "weights_sha256": HASH,
        "text_sha256": HASH,
        "units_sha256": HASH,
        "settings": Settings(
            window_tokens=64,
            windows=WINDOWS,
            prompt_tokens=1,
            recall_lengths=[512],
            recall_cases=CASES,
            batch=8,
            seed=0,
            prefill="coded",
        ),
        "gates": Gates(),
        "exact": Run(window_nll=EXACT, recall=[Hits(tokens=512, hits=hits(0))]),
        "accepted": Accepted(
            window_nll=CODED,
            recall=[Hits(tokens=512, hits=hits(1))],
            name="a",
            codebooks_sha256=HASH,
            graph_sha256=HASH,
            backend="cpu-op",
            cache_tokens=512,
            cache_bytes=1000,
        ),
    }
    return Baseline(**{**fields, **changes})


def measured(
    nll: list[float] | None = None, answers: str | None = None, coded_tokens: int = 400, cache_bytes: int = 1000
) -> Measured:
    return Measured(
        CODED if nll is None else nll,
        [Hits.model_construct(tokens=512, hits=hits(1) if answers is None else answers)],
        coded_tokens,
        cache_bytes,
    )


def verdicts(found: Measured, of: Baseline | None = None, **limits: float) -> dict[str, Verdict]:
    of = of or baseline()
    results = judge(of, found, of.gates.override(limits))
    return {r.name: r.verdict for r in results if r.verdict is not Verdict.ACCEPT}


def test_sound() -> None:
    results = judge(baseline(), measured(), Gates())
    assert GateReport("a", results, 1.0).verdict is Verdict.ACCEPT
    assert [r.name for r in results] == [
        "codes-in-use",
        "perplexity-recovery",
        "perplexity-plausible",
        "perplexity-against-accepted",
        "recall-recovery-512",
        "recall-plausible-512",
        "recall-against-accepted-512",
        "memory-against-accepted",
    ]


def test_perplexity_recovery_is_proven_refuted_or_open() -> None:
    name, free = "perplexity-recovery", {"perplexity_tolerance": 50.0}
    mean = math.expm1(float(np.mean(np.array(CODED) - EXACT)))
    assert verdicts(measured(), max_perplexity_increase=mean * 0.8) == {name: Verdict.REGRESSION}
    assert verdicts(measured(), max_perplexity_increase=mean * 1.0001) == {name: Verdict.INCOMPLETE}
    assert verdicts(measured(), max_perplexity_increase=mean * 1.3) == {}
    # No rounding: the bound itself passes, the next float below it does not.
    figures = judge(baseline(), measured(), Gates())[1].figures
    assert verdicts(measured(), max_perplexity_increase=figures["upper"]) == {}
    below = math.nextafter(figures["upper"], 0)
    assert verdicts(measured(), max_perplexity_increase=below) == {name: Verdict.INCOMPLETE}
    below = math.nextafter(figures["lower"], 0)
    assert verdicts(measured(), max_perplexity_increase=below) == {name: Verdict.REGRESSION}
    huge = [nll + 5000 for nll in EXACT]
    assert verdicts(measured(huge), **free)[name] is Verdict.REGRESSION


def test_worse_than_accepted_but_within_recovery() -> None:
    worse = [nll + 0.005 for nll in CODED]
    assert verdicts(measured(worse)) == {"perplexity-against-accepted": Verdict.REGRESSION}
    assert verdicts(measured(worse), perplexity_tolerance=0.01) == {}
    hair = [nll + 1e-6 for nll in CODED]
    assert verdicts(measured(hair)) == {}, "significant, and no matter: another machine's last bits"


def test_too_good_to_be_true() -> None:
    better = [nll - 0.05 + 0.001 * (i % 3) for i, nll in enumerate(EXACT)]
    assert verdicts(measured(better)) == {"perplexity-plausible": Verdict.ANOMALOUS}
    weak = baseline(exact=Run(window_nll=EXACT, recall=[Hits(tokens=512, hits=hits(30))]))
    assert verdicts(measured(answers=hits(0)), weak) == {"recall-plausible-512": Verdict.ANOMALOUS}
    assert verdicts(measured(answers=hits(25)), weak, max_recall_loss=0.2) == {
        "recall-against-accepted-512": Verdict.REGRESSION
    }, "five gains are chance"


def test_the_exact_run_in_place_of_the_artifact() -> None:
    assert verdicts(measured(EXACT)) == {"codes-in-use": Verdict.ANOMALOUS}
    nearly = [nll + 1e-6 * (-1) ** i for i, nll in enumerate(EXACT)]
    assert verdicts(measured(nearly)) == {"codes-in-use": Verdict.ANOMALOUS}, "as another framework would give it"
    assert verdicts(measured(coded_tokens=0)) == {"codes-in-use": Verdict.ANOMALOUS}


def test_recall() -> None:
    recovery, against = "recall-recovery-512", "recall-against-accepted-512"
    assert verdicts(measured(answers=hits(20))) == {recovery: Verdict.REGRESSION, against: Verdict.REGRESSION}
    assert verdicts(measured(answers=hits(4))) == {recovery: Verdict.INCOMPLETE}, "cannot tell: 4 of 100, allowed 5"
    assert verdicts(measured(answers=hits(4)), max_recall_loss=0.1) == {}
    assert verdicts(measured(answers=hits(6)), max_recall_loss=0.2) == {against: Verdict.REGRESSION}, "5 lost: p = 1/32"
    assert verdicts(measured(answers=hits(1)), max_recall_loss=0.999) == {}
    vacuous = baseline(exact=Run(window_nll=EXACT, recall=[Hits(tokens=512, hits=hits(98))]))
    found = verdicts(measured(answers=hits(99)), vacuous)
    assert found[recovery] is Verdict.INCOMPLETE, "nothing to lose proves nothing"


def test_missing_and_nan_figures_never_pass() -> None:
    perplexity = {f"perplexity-{k}" for k in ("recovery", "plausible", "against-accepted")} | {"codes-in-use"}
    for nll in ([*CODED[:-1], math.nan], [math.inf, *CODED[1:]], CODED[:-1], []):
        assert verdicts(measured(nll)) == dict.fromkeys(perplexity, Verdict.INCOMPLETE)
    recall = {f"recall-{k}-512" for k in ("recovery", "plausible", "against-accepted")}
    assert verdicts(measured(answers=hits(0, CASES - 1))) == dict.fromkeys(recall, Verdict.INCOMPLETE)
    missing = Measured(CODED, [], 400, 1000)
    assert verdicts(missing) == dict.fromkeys(recall, Verdict.INCOMPLETE)
    assert GateReport("a", [], 0.0).verdict is Verdict.INCOMPLETE


def test_memory() -> None:
    assert verdicts(measured(cache_bytes=1001)) == {"memory-against-accepted": Verdict.REGRESSION}
    assert verdicts(measured(cache_bytes=1001), max_memory_increase=0.01) == {}


def test_the_gravest_verdict_wins() -> None:
    def overall(*found: Verdict) -> Verdict:
        return GateReport("a", [GateResult(str(i), v, "") for i, v in enumerate(found)], 0.0).verdict

    accept, regression, anomalous, incomplete = Verdict
    assert overall(accept, accept) is accept
    assert overall(incomplete, accept) is incomplete
    assert overall(incomplete, regression, accept) is regression
    assert overall(regression, anomalous, incomplete) is anomalous
    assert [v.value for v in Verdict] == [0, 1, 3, 4]


def test_limits_out_of_range() -> None:
    for changes, message in (
        ({"confidence": 0.3}, r"gates\.confidence: 0\.3 is out of range"),
        ({"max_recall_loss": 0.0}, r"gates\.max_recall_loss: 0\.0"),
        ({"max_perplexity_increase": math.nan}, r"gates\.max_perplexity_increase: nan"),
    ):
        with pytest.raises(GsrqError, match=message):
            Gates().override(changes)


def test_baselines_round_trip_and_refuse_damage(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    save_baseline(path, baseline())
    assert load_baseline(path) == baseline(), "bit by bit"
    text = path.read_text()

    def refused(content: str, message: str) -> None:
        path.write_text(content)
        with pytest.raises(GsrqError, match=message):
            load_baseline(path)

    refused(text[: len(text) // 2], "is not JSON")
    refused(text.replace(repr(EXACT[3]), "NaN"), r"exact\.window_nll\.3: .*finite")
    refused(text.replace(repr(EXACT[3]), "null"), r"exact\.window_nll\.3")
    refused(text.replace(f"   {EXACT[3]!r},\n", ""), "exact has 15 windows, settings say 16")
    refused(text.replace('"schema": "1.0"', '"schema": "2.0"'), "schema '2.0', this version reads 1.0")
    refused(text.replace(hits(1), hits(1)[1:]), "accepted has 99 cases at 512 tokens, settings say 100")
    refused(text.replace('"recall_cases": 100', '"recall_cases": 90'), "has 100 cases at 512 tokens")
    refused('{"a": 1}', "is not a regression baseline")
    data = json.loads(text)
    del data["exact"]["recall"]
    refused(json.dumps(data), r"exact\.recall: Field required")


def report() -> GateReport:
    results = judge(baseline(), measured([nll + 0.005 for nll in CODED], hits(4)), Gates())
    odd = GateResult("odd", Verdict.ANOMALOUS, "a | b <c> & \x00\x1b\nsecond", {"value": 0.1 + 0.2})
    return GateReport("arti|fact", [*results, odd], 12.34, {"model": "m & m"})


def test_junit_parses_and_says_everything() -> None:
    root = ET.fromstring(junit_xml(report()))
    suite = root[0]
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["9", "2", "1", "0"]
    assert {p.get("name"): p.get("value") for p in suite.findall("properties/property")} == {
        "verdict": "ANOMALOUS",
        "artifact": "arti|fact",
        "model": "m & m",
    }
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert len(cases) == 9
    odd = cases["odd"]
    assert odd.find("failure").get("type") == "ANOMALOUS"  # type: ignore[union-attr]
    assert odd.find("failure").text == "a | b <c> & \ufffd\ufffd\nsecond"  # type: ignore[union-attr]
    figures = {p.get("name"): p.get("value") for p in odd.findall("properties/property")}
    assert float(str(figures["value"])) == 0.1 + 0.2, "unrounded"
    assert cases["perplexity-against-accepted"].find("failure").get("type") == "REGRESSION"  # type: ignore[union-attr]
    assert cases["recall-recovery-512"].find("error").get("type") == "INCOMPLETE"  # type: ignore[union-attr]
    assert cases["perplexity-recovery"].find("failure") is None
    assert cases["perplexity-recovery"].find("error") is None


def test_markdown_is_one_table_whatever_the_text() -> None:
    lines = markdown(report()).splitlines()
    assert lines[0] == "## ⚠️ gsrq regress: ANOMALOUS"
    rows = [line for line in lines if line.startswith("| ") and "|---" not in line]
    gates = [row for row in rows if row.replace("\\|", "").count("|") == 8]
    assert len(gates) == 1 + 9, "the head and a row a gate"
    assert "a \\| b &lt;c&gt; &amp; " in gates[-1]
    assert "<br>second" in gates[-1]

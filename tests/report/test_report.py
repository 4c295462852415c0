"""metrics.json and report.html."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.evaluate.recall import DEPTHS, LengthRecall, Rate, RecallMetrics
from gsrq_export.evaluate.stats import wilson
from gsrq_export.evaluate.suite import Evaluation, PerplexityMetrics, compare
from gsrq_export.report.html import write_report
from gsrq_export.report.schema import BuildMetrics, CacheSize, Distortion

NASTY = '<script>alert("1")</script>&\'"'


def rate(correct: int, cases: int) -> Rate:
    if not cases:
        return Rate(rate=None, correct=0, cases=0, interval=None)
    return Rate(rate=correct / cases, correct=correct, cases=cases, interval=list(wilson(correct, cases)))


def evaluation(perplexity: float, hits: dict[int, int]) -> Evaluation:
    lengths = [
        LengthRecall(
            tokens=t, by_depth=dict(zip(DEPTHS, [rate(k, 12), rate(0, 0), rate(0, 0)], strict=True)), **rate(k, 12)
        )
        for t, k in hits.items()
    ]
    scored = PerplexityMetrics(
        perplexity=perplexity,
        interval=[perplexity * 0.9, perplexity * 1.1],
        nll=math.log(perplexity),
        windows=7,
        window_tokens=256,
        prompt_tokens=1,
        scored_tokens=7 * 255,
    )
    return Evaluation(perplexity=scored, recall=RecallMetrics(facts=4, lengths=lengths), seed=0)


def metrics(layers: int = 5) -> BuildMetrics:
    exact, coded = evaluation(21.5, {512: 12, 2048: 11}), evaluation(22.25, {512: 11, 2048: 9})
    sizes = [
        CacheSize(n, 32 * n, 135_168, 3 << 20, 3072 * n, 16 * (32 * n + 135_168 + (3 << 20)) / (3072 * n))
        for n in (300, 2048)
    ]
    distortion = [
        Distortion(layer, kind, [0.6**r for r in range(1, stages + 1)], [1 - 0.03 * r for r in range(stages)])
        for layer in range(layers)
        for kind, stages in (("key", 7), ("value", 3))
    ]
    return BuildMetrics("demo", 1.0, 1.4, 0.6, sizes, distortion, exact, coded, compare(exact, coded))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def render(path: Path, built: BuildMetrics) -> str:
    write_report(path, built, {"model": NASTY, "layers": 5}, {NASTY: "f" * 64})
    return path.read_text("utf-8")


def test_page_shows_the_numbers_and_is_self_contained(tmp_path: Path) -> None:
    html = render(tmp_path / "report.html", replace(metrics(), name=NASTY))
    page = Page(html)
    assert "script" not in page.tags
    assert not page.links
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)
    assert page.text.count(NASTY) >= 4, "title, heading, a value and a key, as text"
    text = " ".join(page.text.split())
    for shown in (
        "21.500",
        "22.250",
        "+3.49 %",
        "0.92 (11/12)",
        "0.75 (9/12)",
        "0.47 to 0.91",
        "none",
        "f" * 64,
        "2k",
        "300",
    ):
        assert shown in text, shown
    charts = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(charts) == 6
    for chart in charts:
        ET.fromstring(chart)  # well-formed
        for number in re.findall(r' (?:x|y|cx|cy|width|height)="([^"]*)"', chart):
            assert -1 <= float(number) <= 430


def test_charts_place_values(tmp_path: Path) -> None:
    html = render(tmp_path / "report.html", metrics())
    recall = next(c for c in re.findall(r"<svg.*?</svg>", html, re.S) if "Recall by context" in c)
    heights = {
        title: float(height) for height, title in re.findall(r'height="([\d.]+)"><title>([^<]*)</title>', recall)
    }
    full = heights["exact, 512: 1"]
    assert heights["coded, 512: 0.917"] == pytest.approx(full * 11 / 12, abs=0.1)
    assert heights["coded, 2k: 0.75"] == pytest.approx(full * 0.75, abs=0.1)


def test_parts_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    html = render(tmp_path / "r.html", replace(metrics(), exact=None, coded=None, comparison=None))
    assert "Perplexity" not in html
    assert "Recall" not in html
    bare = replace(metrics(), sizes=[], distortion=[], comparison=None)
    html = render(tmp_path / "r.html", bare)
    assert "Codewords" not in html
    assert "Perplexity" in html
    one = render(tmp_path / "r.html", replace(metrics(1), sizes=metrics().sizes[:1], exact=None, comparison=None))
    assert one.count("<svg") == 6


def test_many_layers_and_stages_stay_readable(tmp_path: Path) -> None:
    html = render(tmp_path / "r.html", metrics(layers=80))
    usage = next(c for c in re.findall(r"<svg.*?</svg>", html, re.S) if "Codewords used, keys" in c)
    assert usage.count('class="cell key"') == 80 * 7
    assert usage.count("<text") < 40


def test_metrics_round_trip(tmp_path: Path) -> None:
    built, path = metrics(), tmp_path / "metrics.json"
    built.save(path)
    assert BuildMetrics.load(path) == built
    data = json.loads(path.read_text())
    assert data["schema"] == 1

    for change, message in (
        ({"schema": 2}, "schema is not 1"),
        ({"surprise": 1}, "surprise"),
        ({"sizes": [{"context_tokens": 1}]}, "code_bytes"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ArtifactError, match=message):
            BuildMetrics.load(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"metrics\.json"):
        BuildMetrics.load(path)


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    bad = metrics()
    bad.distortion[3].relative_mse_by_stage[1] = math.nan
    with pytest.raises(GsrqError, match=r"metrics\.distortion\[3\]\.relative_mse_by_stage\[1\] is nan"):
        bad.save(tmp_path / "metrics.json")
    with pytest.raises(GsrqError, match="is nan"):
        render(tmp_path / "report.html", bad)
    assert not list(tmp_path.iterdir())

"""metrics.json and report.html."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report.built_metrics import NASTY, evaluation, long_metrics, metrics, profiles, rates
from report.page import Page, data_marks, texts, titles

from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.report.charts import paid_back_from, shared_point
from gsrq_export.report.html import write_report
from gsrq_export.report.schema import BuildMetrics, CacheSize, RecallPoint

RATE_CHARTS = 5  # two texts, one length of recall, KL, one task
CODEBOOK_CHARTS = 9  # stages, layers, positions, heads and use of keys and of values, entropy, the most used


def render(path: Path, built: BuildMetrics) -> str:
    write_report(path, built, {"model": NASTY, "layers": 5}, {NASTY: "f" * 64})
    return path.read_text("utf-8")


def test_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    built = replace(metrics(), name=NASTY, rates=rates(NASTY))
    html = render(tmp_path / "report.html", replace(built, **long_metrics(built)))
    page = Page(html)
    assert page.open == [], "every tag is closed"
    assert not {"script", "link", "iframe", "object", "embed", "img", "image", "use", "base"} & set(page.tags)
    assert not page.links
    assert not page.handlers
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    # Title, heading, a fact, a provenance key, the table of rates, tooltips of its charts.
    assert page.text.count(NASTY) >= 6
    assert html.count("<script") == 0


def test_page_shows_the_numbers(tmp_path: Path) -> None:
    built = metrics()
    words = Page(render(tmp_path / "report.html", replace(built, **long_metrics(built)))).words
    for shown in (
        *("21.500", "22.250", "+3.49 %", "0.92 (11/12)", "0.75 (9/12)", "0.47 to 0.91", "none", "f" * 64, "2k", "300"),
        *("1.0349 -", "loses +0.0343 nats a token", "1 bit nominal", "8.51 bits", "0.51 bits"),
        *("+4.00 %", "0.98 [0.89, 1.00]", "effective, 128k", "9.00", "1.25", "8.20", "-0.01 %"),  # rates
        *("0.750 0.65 to 0.85 0.625 0.53 to 0.72 -0.125 -0.25 to 0.00", "0.937 0.91 to 0.96", "0.0123 0.01 to 0.0156"),
        *("Of 640 calibration tokens", "with beam 2", "keys 7 0.1100 0.0550 0.1650 82 % 6.90 bits"),
    ):
        assert shown in words, shown


def test_every_chart_has_a_title_and_data_inside_its_frame(tmp_path: Path) -> None:
    page = Page(render(tmp_path / "report.html", metrics()))
    assert len(page.charts) == RATE_CHARTS + 3 + CODEBOOK_CHARTS + 2
    assert page.tags.count("svg") == len(page.charts) == page.tags.count("figcaption")
    for name, chart in page.charts.items():
        title = chart.find("title")
        assert title is not None
        assert title.text == name
        assert data_marks(chart), name
        _, _, width, height = (float(v) for v in chart.attrib["viewBox"].split())
        for element in chart.iter():
            for key, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.attrib.get(key, 0)) <= limit, (name, element.attrib)
            for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", element.attrib.get("points", "")):
                assert 0 <= float(x) <= width
                assert 0 <= float(y) <= height


def test_charts_place_values(tmp_path: Path) -> None:
    charts = Page(render(tmp_path / "report.html", metrics())).charts
    heights = {t: float(e.attrib["height"]) for t, e in titles(charts["Recall by context length"]).items()}
    full = heights["exact, 512: 1"]
    assert heights["coded, 512: 0.917"] == pytest.approx(full * 11 / 12, abs=0.1)
    assert heights["coded, 2k: 0.75"] == pytest.approx(full * 0.75, abs=0.1)
    # Log axes: from 0.5 to 1 bit is a quarter of the way from 0.5 to 8.
    dots = titles(charts["Recall at 2k tokens against bits"])
    across = {name.split(":")[0]: float(e.attrib["cx"]) for name, e in dots.items()}
    ours = sorted(float(e.attrib["cx"]) for name, e in dots.items() if name.startswith("GSRQ"))
    share = math.log(2) / math.log(5)  # 0.5, 1 and 2.5 bits
    assert ours[1] - ours[0] == pytest.approx((across["KIVI, b=2"] - ours[0]) * share, abs=0.2)
    up = {name: float(e.attrib["cy"]) for name, e in dots.items()}
    assert up["GSRQ R32: 0.979"] < up["GSRQ R16: 0.625"] < up["KIVI, b=2: 0.5"]
    cells = titles(charts["Error by KV head, keys"])
    assert float(cells["4, 0: 0.165"].attrib["fill-opacity"]) == 1.0
    assert float(cells["4, 1: 0.055"].attrib["fill-opacity"]) == pytest.approx(1 / 3, abs=2e-3)


def test_bits_of_charts_are_effective_where_all_rows_have_them(tmp_path: Path) -> None:
    assert shared_point(rates()) == "8192x64", "of the two that all have the one with more tokens"
    assert shared_point([]) is None
    at_exact = replace(rates()[2], label="at the exact cache's recall", recall=[RecallPoint(2048, 11 / 12, 0.6, 1.0)])
    built = replace(metrics(), rates=[*rates(), at_exact])
    page = Page(render(tmp_path / "r.html", built))
    chart = page.charts["Recall at 2k tokens against bits"]
    assert "effective bits an element, 64 \N{MULTIPLICATION SIGN} 8k tokens" in [t.text for t in texts(chart)]
    assert "the charts show them for 64 sequences of 8k tokens" in page.words
    (exact,) = (e for e in data_marks(chart) if e.attrib["class"] == "line exact")
    heights = {p.split(",")[1] for p in exact.attrib["points"].split()}
    assert heights == {titles(chart)["at the exact cache's recall: 0.917"].attrib["cy"]}, "dashed at 11 of 12"

    unlike = [replace(point, effective_bits={str(i): 1.0}) for i, point in enumerate(built.rates)]
    page = Page(render(tmp_path / "r.html", replace(built, rates=unlike, exact=None)))
    chart = page.charts["Recall at 2k tokens against bits"]
    assert "nominal bits an element" in [t.text for t in texts(chart)]
    assert not [e for e in data_marks(chart) if "exact" in e.attrib["class"]]
    assert "the charts show" not in page.words


def test_sequences_that_pay_the_codebooks_back(tmp_path: Path) -> None:
    size = CacheSize(1024, 100, 50, 1000, 400, 46.0)
    assert paid_back_from(size, 400) == 5, "4 sequences take as much"
    assert paid_back_from(size, 401) == 4
    assert paid_back_from(size, 150) is None
    for entry, said in (
        (size, "At 1k tokens the coded cache is the smaller one from 5 sequences on beside a 16-bit cache, from 21 on"),
        (replace(size, code_bytes=200), "from 7 sequences on beside a 16-bit cache, never beside FP8"),
        (replace(size, code_bytes=400), "no number of sequences makes the coded cache smaller than a 16-bit one"),
    ):
        assert said in Page(render(tmp_path / "r.html", replace(metrics(), sizes=[entry]))).words


def test_losses_that_a_log_axis_cannot_show_are_drawn_at_its_end_and_said_so(tmp_path: Path) -> None:
    page = Page(render(tmp_path / "report.html", metrics()))
    assert "FP8: 0.1" in titles(page.charts["Perplexity, novels against bits"])
    assert "FP8: 1e-05" in titles(page.charts["KL against bits"])
    assert page.words.count("less than 0.1 % is drawn at 0.1 %") == 1, "of the two texts one has such a loss"
    assert page.words.count("less than 1e-05 nats is drawn at 1e-05 nats") == 1


def test_parts_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    def page(**changes: object) -> Page:
        return Page(render(tmp_path / "r.html", replace(metrics(), **changes)))  # type: ignore[arg-type]

    none = page(exact=None, coded=None, comparison=None, rates=[])
    assert "Perplexity" not in none.text
    assert "Recall" not in none.text
    assert "Loss against bits" not in none.text
    assert len(none.charts) == CODEBOOK_CHARTS + 2
    bare = page(sizes=[], distortion=[], profile=[], comparison=None, rates=[])
    assert "Codebooks" not in bare.text
    assert "Tasks" not in bare.text
    assert "Fidelity" not in bare.text
    assert len(bare.charts) == 3
    unasked = page(exact={**evaluation(20, {}), "recall": None}, coded={**evaluation(21, {}), "recall": None}, rates=[])
    assert "by depth" not in unasked.text
    older = page(profile=[], rates=[])
    assert len(older.charts) == 3 + 4 + 2, "training's distortion stands in: stages, layers, use of keys and values"
    one = page(sizes=metrics().sizes[:1], exact=None, comparison=None, profile=profiles(1), rates=rates()[:1])
    assert len(one.charts) == 4 + 2 + CODEBOOK_CHARTS + 2


def test_many_layers_and_stages_stay_readable(tmp_path: Path) -> None:
    usage = Page(render(tmp_path / "r.html", metrics(layers=80))).charts["Codewords used, keys"]
    assert sum(e.attrib["class"] == "cell key" for e in data_marks(usage)) == 80 * 7
    assert len(texts(usage)) < 40


def test_metrics_round_trip(tmp_path: Path) -> None:
    base = metrics()
    built, path = replace(base, **long_metrics(base)), tmp_path / "metrics.json"
    built.save(path)
    assert BuildMetrics.load(path) == built
    data = json.loads(path.read_text())
    assert data["schema"] == 1

    older = {name: value for name, value in data.items() if name not in ("profile", "rates")}
    path.write_text(json.dumps(older))
    assert BuildMetrics.load(path) == replace(built, profile=[], rates=[])

    for change, message in (
        ({"schema": 2}, "schema is not 1"),
        ({"surprise": 1}, "surprise"),
        ({"sizes": [{"context_tokens": 1}]}, "code_bytes"),
        ({"profile": [{"layer": 0, "kind": "key", "profile": {"by_position": []}}]}, "vectors"),
        ({"rates": [{"label": "x", "recall": []}]}, "ours"),
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

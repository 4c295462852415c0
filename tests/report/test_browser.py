"""The page as a real browser lays it out, on phones, a tablet and a desktop, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report.browser import CHROMIUM, PHONE, Browser, starts
from report.built_metrics import long_metrics, metrics, rates

from gsrq_export.report.charts import Figure
from gsrq_export.report.html import render, write_report
from gsrq_export.report.svg import Axis, Curve, plot

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

DOCS = Path(__file__).parents[2] / "docs/img"
READABLE = 11  # CSS pixels of the charts' smallest font, on a phone too
# What sticks out of the window (tables may, inside what scrolls) and of the charts; what stands on each other.
LAYOUT = """(() => {
const wide = document.documentElement.clientWidth, all = (q, e = document) => [...e.querySelectorAll(q)];
const box = e => e.getBoundingClientRect(), fonts = [];
const out = all("body *").filter(e => !e.closest(".scroll > *") && !e.closest("svg > *"))
  .filter(e => box(e).right > wide + 1 || box(e).left < -1).map(e => e.outerHTML.slice(0, 80));
const cut = [], covered = [], empty = [];
for (const svg of all("svg")) {
  const frame = box(svg), scale = svg.getScreenCTM().a, texts = all("text", svg).map(t => [t.textContent, box(t)]);
  const marks = all(".line, .dot, .bar, .cell", svg).map(box);
  if (frame.width < 200 || frame.height < 60 || !marks.some(m => m.width + m.height > 4)) empty.push(svg.ariaLabel);
  fonts.push(...all("text", svg).map(t => parseFloat(getComputedStyle(t).fontSize) * scale));
  for (const [text, b] of texts)
    if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
      cut.push([svg.ariaLabel, text]);
  texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 5 * scale) covered.push([svg.ariaLabel, one, other, x, y]);  // lines are taller than their letters
  }));
}
// Words of a label that fall apart, and tables cut off at an end with no way to scroll there.
const stuck = all("table").filter(t => box(t).right > box(t.parentElement).right + 1 &&
  getComputedStyle(t.parentElement).overflowX !== "auto").length;
return {page: document.documentElement.scrollWidth, window: innerWidth, out, cut, covered, empty, stuck,
  charts: all("svg").length, font: Math.min(...fonts)};
})()"""
# The least contrast (WCAG's ratio) of text, and of the charts' marks, to the card below.
CONTRAST = """(() => {
const all = q => [...document.querySelectorAll(q)], canvas = document.createElement("canvas").getContext("2d");
const light = colour => {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const card = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
const ratio = colour => { const l = light(colour); return (Math.max(l, card) + .05) / (Math.min(l, card) + .05); };
const least = (q, of) => Math.min(...all(q).map(e => ratio(getComputedStyle(e)[of])));
return {text: Math.min(least("td, th, figcaption, .cap, .tile span, .tile b", "color"), least("svg text", "fill")),
  marks: Math.min(least(".dot, .bar", "fill"), least(".line", "stroke"))};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not starts():
        pytest.skip(f"{CHROMIUM} does not start")
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers, a crowd of codecs, long names."""
    base = metrics(layers=28)
    crowd = [
        replace(
            rates()[2], label=f"a codec of some name {i}", nominal_bits=bits, effective_bits={"8192x64": 1.2 * bits}
        )
        for i in range(12)
        for bits in [1 + 0.11 * i]
    ]
    built = replace(base, **long_metrics(base), rates=[*base.rates, *crowd], name="m" * 90)
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, built, {"Model": "/a/path/" + "x" * 120}, {"Weights sha256": "f" * 64})
    return path


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_overflows_covers_or_asks_for_more(width: int, browser: Browser, page: Path) -> None:
    seen = browser.look(page, width, LAYOUT, scale=2 if width < PHONE else 1)
    found: dict[str, Any] = seen.value
    assert found["window"] == width
    assert found["page"] <= width, found
    assert found["out"] == found["cut"] == found["covered"] == found["empty"] == []
    assert found["stuck"] == 0
    assert found["charts"] > 15
    assert found["font"] >= READABLE
    assert seen.requests == [page.resolve().as_uri()], "the page itself and nothing else"
    assert seen.console == []


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_of_a_search_fits_too(width: int, browser: Browser, tmp_path: Path) -> None:
    curves = [Curve(name, style, [(0.5, 0.4), (1, 0.1)]) for name, style in (("uniform", "exact"), ("tuned", "coded"))]
    chart = plot("loss", Axis("effective bits", log=True), Axis("loss", log=True), curves)
    compared = [
        ["budget", *(f"a long heading {i}" for i in range(9))],
        ["uniform, heads together", *["50,331,648"] * 9],
    ]
    page = tmp_path / "tuned.html"
    figure = Figure("Loss against bits", "A note.", chart)
    page.write_text(render("tuned.html.j2", name="n", target="t", figure=figure, compared=compared, budget=compared))
    seen = browser.look(page, width, LAYOUT)
    assert seen.value["page"] <= seen.value["window"] == width
    assert seen.value["out"] == seen.value["cut"] == seen.value["covered"] == []
    assert seen.value["font"] >= READABLE
    assert seen.console == []


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.stem)
def test_nothing_is_cut_or_covered_in_the_pictures_of_the_documents(picture: Path, browser: Browser) -> None:
    found = browser.look(picture, 1280, LAYOUT).value
    assert found["charts"] == 1
    assert found["cut"] == found["covered"] == found["empty"] == []


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark: bool, browser: Browser, page: Path) -> None:
    found = browser.look(page, 390, CONTRAST, dark).value
    assert found["text"] >= 4.5
    assert found["marks"] >= 3


def test_what_the_checks_are_for_is_found(browser: Browser, page: Path, tmp_path: Path) -> None:
    broken = page.read_text("utf-8").replace("<main>", '<main><div style="width:900px">wide</div>', 1)
    broken = broken.replace("12px system-ui", "7px system-ui").replace("</main>", '<img src="other.png" alt=""></main>')
    (tmp_path / "broken.html").write_text(broken, "utf-8")
    seen = browser.look(tmp_path / "broken.html", 390, LAYOUT)
    assert seen.value["page"] > 390
    assert seen.value["out"]
    assert seen.value["font"] < READABLE
    assert any("other.png" in line for line in seen.console), "the page's policy refuses pictures, and says so"

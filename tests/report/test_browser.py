"""The page as a real browser lays it out, on a phone and on a desktop."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from report.built_metrics import long_metrics, metrics, rates

from gsrq_export.report.html import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# What sticks out of the window (tables may, inside what scrolls) and of the charts.
MEASURE = """<script>
const wide = innerWidth, out = [];
for (const e of document.querySelectorAll("body *")) {
  const box = e.getBoundingClientRect();
  const outside = box.right > wide + 1 || box.left < -1;
  if (outside && !e.closest(".scroll > *") && !e.closest("svg > *")) out.push(e.outerHTML.slice(0, 80));
}
const cut = [], covered = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  for (const t of svg.querySelectorAll("text")) {
    const box = t.getBoundingClientRect();
    const inside = box.left > frame.left - 1 && box.right < frame.right + 1 && box.bottom < frame.bottom + 1;
    if (!inside) cut.push(t.textContent);
  }
  const names = [...svg.querySelectorAll("text.name")].map(t => t.getBoundingClientRect());
  names.forEach((a, i) => names.slice(i + 1).forEach(b => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 2 && y > 5) covered.push([svg.ariaLabel, x, y]);  // line boxes are taller than their letters
  }));
}
const result = {wide, page: document.documentElement.scrollWidth, out, cut, covered,
  text: Math.min(...[...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height))};
document.body.innerHTML = "<pre id=result></pre>";
document.getElementById("result").textContent = JSON.stringify(result);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows_or_covers(width: int, tmp_path: Path) -> None:
    base = metrics(layers=28)
    crowd = [replace(rates()[2], label=f"a codec of some name {i}", nominal_bits=1 + 0.11 * i) for i in range(12)]
    built = replace(base, **long_metrics(base), rates=[*base.rates, *crowd], name="m" * 90)
    write_report(tmp_path / "r.html", built, {"Model": "/a/path/" + "x" * 120}, {"Weights sha256": "f" * 64})
    html, found = CSP.subn("", (tmp_path / "r.html").read_text("utf-8"))
    assert found == 1, "the page forbids scripts; the measured copy must not"
    (tmp_path / "measured.html").write_text(html.replace("</body>", MEASURE + "</body>"), "utf-8")
    result = measure(tmp_path, width)
    assert result["page"] <= width, result
    assert result["out"] == []
    assert result["cut"] == []
    assert result["covered"] == []
    assert result["text"] >= 10, "pixels of a line of the charts' smallest text"


def measure(folder: Path, width: int) -> dict[str, Any]:
    # A frame of the width: browsers' own windows do not get as narrow as a phone's.
    frame = (
        f'<body style="margin:0"><iframe src="measured.html" style="border:0;width:{width}px;height:800px" '
        'onload="setTimeout(() => document.body.textContent = this.contentDocument.body.textContent, 50)"></iframe>'
    )
    (folder / "frame.html").write_text(frame)
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [
            *(str(BROWSER), *FLAGS, profile, "--allow-file-access-from-files", "--virtual-time-budget=5000"),
            *("--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    text = re.search(r"<body[^>]*>(.*?)</body>", done.stdout, re.S)
    assert text is not None, done.stderr[-500:]
    result: dict[str, Any] = json.loads(unescape(text[1]))
    assert result["wide"] == width
    return result

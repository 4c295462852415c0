"""The charts' axes and labels."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from report.page import texts, titles

from gsrq_export.report.labels import text_width
from gsrq_export.report.svg import WIDTH, Axis, Curve, bars, heatmap, number, plot
from gsrq_export.report.svg import Series as Group


def parse(chart: str) -> ET.Element:
    return ET.fromstring(chart)


@pytest.mark.parametrize("seed", range(5))
def test_names_beside_points_cover_neither_each_other_nor_points(seed: int) -> None:
    draw = random.Random(seed)
    points = [(2 ** draw.uniform(-1, 3), draw.random() ** 2) for _ in range(14)]
    names = [f"codec {'x' * draw.randrange(14)}{i}" for i in range(14)]
    ours = Curve("ours", "coded", [(0.5, 0.2), (2.0, 0.9)])
    chart = parse(
        plot(
            "t",
            Axis("bits", log=True),
            Axis("y", high=1.0),
            [ours, Curve("o", "value", points, joined=False, names=names)],
        )
    )
    shown = [e for e in texts(chart) if "name" in e.attrib["class"]]
    boxes = []
    for e in shown:
        wide, y = text_width(e.text or ""), float(e.attrib["y"])
        x = float(e.attrib["x"]) - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[e.attrib["text-anchor"]]
        boxes.append((x, y - 10.5, x + wide, y + 2.5))
    assert len(shown) >= 12, "nearly all find a place"
    for i, a in enumerate(boxes):
        assert a[0] >= -0.1
        assert a[2] <= WIDTH + 0.1
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] + 0.2 or b[2] <= a[0] + 0.2 or a[3] <= b[1] + 0.2 or b[3] <= a[1] + 0.2
        for dot in (e for e in chart.iter("circle")):
            x, y = float(dot.attrib["cx"]), float(dot.attrib["cy"])
            assert not (a[0] < x < a[2] and a[1] < y < a[3])


def test_a_crowd_keeps_its_points_and_only_names_beside_them() -> None:
    draw = random.Random(0)
    points = [(2 ** draw.uniform(-1, 3), draw.random()) for _ in range(40)]
    crowd = Curve("others", "value", points, joined=False, names=[f"codec {i}" for i in range(40)])
    chart = parse(plot("t", Axis("bits", log=True), Axis("y", high=1.0), [crowd]))
    assert len(list(chart.iter("circle"))) == 40
    assert not [e for e in chart.iter("path") if e.attrib["class"] == "leader"]
    assert 10 < len([e for e in texts(chart) if "name" in e.attrib["class"]]) < 40


def test_long_names_are_cut_and_kept_as_tooltips() -> None:
    name = "a codec of an uncommonly long name, with more"
    chart = parse(
        plot("t", Axis("x"), Axis("y"), [Curve("o", "value", [(1, 1), (2, 2)], joined=False, names=["a", name])])
    )
    assert f"{name}: 2" in titles(chart)
    (shown,) = (e.text for e in texts(chart) if (e.text or "").endswith("…"))
    assert name.startswith(shown[:-1])
    assert 15 < len(shown) < 30


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (1.0, 1000.0, ["1", "10", "100", "1000"]),
        (0.5, 8.0, ["0.5", "1", "2", "5", "10"]),
        (0.09, 0.11, ["0.08", "0.1"]),
        (3e-5, 0.4, ["0.0001", "0.001", "0.01", "0.1"]),
    ],
)
def test_log_axes_have_round_marks(low: float, high: float, marks: list[str]) -> None:
    chart = parse(plot("t", Axis("x"), Axis("y", log=True), [Curve("o", "value", [(0, low), (1, high)])]))
    shown = [e.text for e in texts(chart) if e.attrib["text-anchor"] == "end"]
    assert shown == marks


def test_linear_axes_begin_at_zero_or_below() -> None:
    def marks(values: list[float]) -> list[str | None]:
        chart = plot("t", Axis("x"), Axis("y"), [Curve("o", "value", list(enumerate(values)))])
        return [e.text for e in texts(parse(chart)) if e.attrib["text-anchor"] == "end"]

    assert marks([3.0, 4.0]) == ["0", "1", "2", "3", "4"]
    assert marks([-0.5, 1.0]) == ["-0.5", "0", "0.5", "1"]
    assert marks([0.0, 0.0])[0] == "0"


def test_ticks_that_do_not_fit_are_left_out_evenly() -> None:
    ticks = [str(1000 + i) for i in range(60)]
    chart = parse(bars("t", "layer", Axis("y"), ticks, [Group("keys", "key", [1.0] * 60)]))
    shown = [int(e.text) for e in texts(chart) if re.fullmatch(r"\d{4}", e.text or "")]
    assert 3 <= len(shown) <= 12
    assert len({b - a for a, b in pairwise(shown)}) == 1


def test_names_of_bars_are_broken_not_left_out() -> None:
    ticks = ["assign", "encode, exact", "encode, float32", "GSKM training", "whole"]
    chart = parse(bars("t", "step", Axis("y"), ticks, [Group("keys", "key", [1.0] * 5)]))
    height = float(chart.attrib["viewBox"].split()[3])
    under: dict[float, list[tuple[float, str]]] = {}
    for e in texts(chart):
        if e.attrib["text-anchor"] == "middle":
            under.setdefault(float(e.attrib["x"]), []).append((float(e.attrib["y"]), e.text or ""))
    names = [" ".join(text for _, text in sorted(lines)) for _, lines in sorted(under.items())]
    assert [n for n in names if n not in ("step", *ticks)] in ([], ["encode, float32 step"])
    assert set(ticks) <= {n.removesuffix(" step") for n in names}
    assert max(y for lines in under.values() for y, _ in lines) < height


def test_heatmap_leaves_holes_and_scales() -> None:
    chart = parse(heatmap("t", ("row", "depth", "v"), ["a", "b"], [("r", [0.5, None]), ("s", [2.0, 0.0])], "key"))
    opacity = {name: float(e.attrib["fill-opacity"]) for name, e in titles(chart).items()}
    assert opacity == {"r, a: 0.5": 0.25, "s, a: 2": 1.0, "s, b: 0": 0.0}
    half = parse(heatmap("t", ("row", "depth", "v"), ["a"], [("r", [0.5])], "key", full=1.0))
    assert float(titles(half)["r, a: 0.5"].attrib["fill-opacity"]) == 0.5


def test_numbers() -> None:
    shown = [number(v) for v in (0, 1, 0.12345, 123.4, 1234.6, 2e-5, -0.5, 99999)]
    assert shown == ["0", "1", "0.123", "123", "1235", "2e-05", "-0.5", "99999"]

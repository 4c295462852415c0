"""Small charts as inline SVG. Colours are the page's CSS classes, so that they follow its light or dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
MIDDLE = (LEFT + WIDTH - RIGHT) / 2


@dataclass(frozen=True)
class Series:
    """Values over the chart's x positions; ``low`` and ``high`` draw intervals, ``style`` is a CSS class."""

    label: str
    style: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def lines(title: str, x_label: str, ticks: Sequence[str], series: Sequence[Series], log: bool = False) -> Markup:
    """One line a series over equally spaced positions; with ``log`` all values are above 0."""
    values = [v for s in series for v in s.values]
    frame = _Frame(min(values), max(values), log)
    parts = [frame.axes(), frame.ticks(ticks, _spread(len(ticks))), _text(MIDDLE, HEIGHT - 6, x_label), _legend(series)]
    for s in series:
        places = _spread(len(s.values))
        points = " ".join(f"{x:.1f},{frame.y(v):.1f}" for x, v in zip(places, s.values, strict=True))
        parts.append(f'<polyline class="line {escape(s.style)}" points="{points}"/>')
        if len(s.values) <= 16:
            parts += [
                f'<circle class="dot {escape(s.style)}" cx="{x:.1f}" cy="{frame.y(v):.1f}" r="3">'
                f"<title>{escape(s.label)}: {_number(v)}</title></circle>"
                for x, v in zip(places, s.values, strict=True)
            ]
    return _svg(title, HEIGHT, parts)


def bars(title: str, x_label: str, ticks: Sequence[str], series: Sequence[Series], top: float | None = None) -> Markup:
    """Groups of bars, one a tick, with intervals where a series has them."""
    highest = max((v for s in series for v in (s.high or s.values)), default=1.0)
    frame = _Frame(0.0, top if top is not None else highest)
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(ticks))
    width = min(26.0, 0.8 * slot / max(1, len(series)))
    centres = [LEFT + slot * (i + 0.5) for i in range(len(ticks))]
    parts = [frame.axes(), frame.ticks(ticks, centres), _text(MIDDLE, HEIGHT - 6, x_label), _legend(series)]
    for k, s in enumerate(series):
        for i, value in enumerate(s.values):
            x = centres[i] + (k - len(series) / 2) * width
            y = frame.y(value)
            parts.append(
                f'<rect class="bar {escape(s.style)}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(0.5, width - 1):.1f}" '
                f'height="{frame.y(0) - y:.1f}"><title>{escape(s.label)}, {escape(ticks[i])}: {_number(value)}</title>'
                "</rect>"
            )
            if s.low is not None and s.high is not None:
                middle = x + width / 2
                parts.append(
                    f'<path class="whisker" d="M{middle:.1f} {frame.y(s.low[i]):.1f}V{frame.y(s.high[i]):.1f}'
                    f'M{middle - 3:.1f} {frame.y(s.low[i]):.1f}h6M{middle - 3:.1f} {frame.y(s.high[i]):.1f}h6"/>'
                )
    return _svg(title, HEIGHT, parts)


def heatmap(title: str, x_label: str, rows: Sequence[tuple[str, Sequence[float]]], style: str) -> Markup:
    """A row a label; a cell's opacity is its value in 0 .. 1."""
    columns = max((len(values) for _, values in rows), default=1)
    cell = max(6.0, min(18.0, 260 / max(1, len(rows))))
    wide = (WIDTH - LEFT - RIGHT) / max(1, columns)
    parts = []
    for r, (label, values) in enumerate(rows):
        y = TOP + r * cell
        if len(rows) <= 16 or r % math.ceil(len(rows) / 16) == 0:
            parts.append(_text(LEFT - 6, y + cell * 0.75, label, "end"))
        parts += [
            f'<rect class="cell {escape(style)}" x="{LEFT + c * wide:.1f}" y="{y:.1f}" width="{wide - 0.6:.2f}" '
            f'height="{cell - 0.6:.2f}" fill-opacity="{min(1.0, max(0.0, v)):.3f}">'
            f"<title>{escape(label)}, stage {c + 1}: {_number(v)}</title></rect>"
            for c, v in enumerate(values)
        ]
    bottom = TOP + len(rows) * cell
    step = max(1, math.ceil(columns / 12))
    parts += [_text(LEFT + (c + 0.5) * wide, bottom + 14, str(c + 1)) for c in range(0, columns, step)]
    parts.append(_text(MIDDLE, bottom + 30, x_label))
    return _svg(title, bottom + 36, parts)


class _Frame:
    """The y axis: a range widened to round numbers, from 0 or logarithmic."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self._log = log
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            self._marks = [m * 10.0**e for e in range(first, last) for m in steps] + [10.0**last]
        else:
            raw = max(high, 1e-9) / 4
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999999)
            self._marks = [step * i for i in range(math.ceil(high / step - 1e-6) + 1)]

    def y(self, value: float) -> float:
        low, high = self._marks[0], self._marks[-1]
        share = math.log(value / low) / math.log(high / low) if self._log else (value - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    def axes(self) -> str:
        return "".join(
            f'<path class="grid" d="M{LEFT} {self.y(mark):.1f}H{WIDTH - RIGHT}"/>'
            + _text(LEFT - 6, self.y(mark) + 4, _number(mark), "end")
            for mark in self._marks
        )

    def ticks(self, labels: Sequence[str], places: Sequence[float]) -> str:
        step = max(1, math.ceil(len(labels) / 9))
        return "".join(
            _text(x, HEIGHT - BOTTOM + 16, label)
            for i, (label, x) in enumerate(zip(labels, places, strict=True))
            if i % step == 0
        )


def _spread(count: int) -> list[float]:
    inner, width = LEFT + 14, WIDTH - LEFT - RIGHT - 28
    return [inner + width * (i / (count - 1) if count > 1 else 0.5) for i in range(count)]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], float(LEFT)
    for s in series:
        parts.append(f'<rect class="bar {escape(s.style)}" x="{x:.0f}" y="6" width="10" height="10" rx="2"/>')
        parts.append(_text(x + 14, 15, s.label, "start"))
        x += 30 + 6.7 * len(s.label)
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    # The parts are ours; every text that came from outside was escaped where it was put in.
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )

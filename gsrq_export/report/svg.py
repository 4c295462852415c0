"""Small charts as inline SVG. Colours are CSS classes (chart.css), so that they follow the page's light or dark mode.

A chart is as wide as a phone's screen and is scaled up little elsewhere, so that its text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from gsrq_export.report.labels import Box, along, place, text_width

WIDTH, PLOT, TALL = 320, 170, 250  # of a chart; height of the part inside the axes, and with names in it
LEFT, RIGHT, BOTTOM = 54, 8, 39
MIDDLE = (LEFT + WIDTH - RIGHT) / 2
LINE = 16  # height of a line of text
STEPS = 6  # of a heatmap's scale


def number(value: float) -> str:
    """Three digits, never an exponent for what charts show."""
    return (
        f"{value:.3g}" if 1e-4 <= abs(value) < 1000 or value == 0 else f"{value:.0f}" if value > 1 else f"{value:.0e}"
    )


@dataclass(frozen=True)
class Axis:
    """``ticks`` are (value, text); without them round numbers are chosen. A linear axis begins at 0 where no value is
    below; ``high`` fixes its end.
    """

    label: str
    log: bool = False
    high: float | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    text: Callable[[float], str] = number


@dataclass(frozen=True)
class Curve:
    """Points (x, y), joined or not; ``low`` and ``high`` draw intervals. ``names`` are tooltips, and stand beside
    points that are not joined. Without ``dots`` it is a line alone.
    """

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    joined: bool = True
    names: Sequence[str] | None = None
    dots: bool = True


@dataclass(frozen=True)
class Series:
    """Values over a chart's groups of bars; ``low`` and ``high`` draw intervals, ``style`` is a CSS class."""

    label: str
    style: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def plot(title: str, x_axis: Axis, y_axis: Axis, curves: Sequence[Curve]) -> Markup:
    """Curves and points over two numeric axes; on a logarithmic axis all values are above 0."""
    legend, top = _legend([(c.label, c.style) for c in curves])
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points] + [v for c in curves for v in (*(c.low or ()), *(c.high or ()))]
    pad = 0 if x_axis.log else 12
    bottom = top + (TALL if any(c.names and not c.joined for c in curves) else PLOT)
    across = _Scale(x_axis, min(xs), max(xs), LEFT + pad, WIDTH - RIGHT - pad, tight=True)
    up = _Scale(y_axis, min(ys), max(ys), bottom, top)
    parts = [legend, _y_axis(up, y_axis, top), _x_axis([(across(v), t) for v, t in across.ticks], x_axis.label, bottom)]
    labels: list[tuple[float, float, str]] = []
    drawn: list[Box] = []  # lines and whiskers, which names had better not cover
    for c in curves:
        places = [(across(x), up(y)) for x, y in c.points]
        if c.joined and len(places) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="line {escape(c.style)}" points="{line}"/>')
            drawn += [box for start, end in pairwise(places) for box in along(start, end)]
        if c.low is not None and c.high is not None:
            parts += [_whisker(p[0], up(a), up(b)) for p, a, b in zip(places, c.low, c.high, strict=True)]
            drawn += [(p[0] - 3, up(b), p[0] + 3, up(a)) for p, a, b in zip(places, c.low, c.high, strict=True)]
        if c.dots and (len(places) <= 24 or not c.joined):
            for i, ((x, y), (_, value)) in enumerate(zip(places, c.points, strict=True)):
                name = c.names[i] if c.names else c.label
                parts.append(
                    f'<circle class="dot {escape(c.style)}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                    f"<title>{escape(name)}: {escape(y_axis.text(value))}</title></circle>"
                )
        if c.names and not c.joined:
            labels += [(x, y, name) for (x, y), name in zip(places, c.names, strict=True)]
    dots = [(across(x) - 4, up(y) - 4, across(x) + 4, up(y) + 4) for c in curves if c.dots for x, y in c.points]
    written = []  # over all leaders, whose lines would strike them through
    for label in place(labels, dots, drawn, (LEFT, top - 7, WIDTH, bottom + 7)):
        left, _, right, base = label.box
        if label.leader:
            (x, y), (to_x, to_y) = label.leader
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>')
        x = {"start": left, "middle": (left + right) / 2, "end": right}[label.anchor]
        written.append(_text(x, base - 2.5, label.text, label.anchor, "tick name"))
    parts += written
    return _svg(title, bottom + BOTTOM, parts)


def bars(title: str, x_label: str, y_axis: Axis, ticks: Sequence[str], series: Sequence[Series]) -> Markup:
    """Groups of bars, one a tick, with intervals where a series has them. Names too long for their place are broken at
    spaces; numbers that do not fit are left out evenly.
    """
    legend, top = _legend([(s.label, s.style) for s in series])
    up = _Scale(y_axis, 0.0, max(v for s in series for v in (s.high or s.values)), top + PLOT, top)
    slot = (WIDTH - LEFT - RIGHT) / len(ticks)
    width = min(26.0, 0.8 * slot / len(series))
    centres = [LEFT + slot * (i + 0.5) for i in range(len(ticks))]
    under = list(zip(centres, ticks, strict=True))
    broken = [] if _fits(under) else [(x, _broken(t, slot - 1)) for x, t in under]
    if any(lines is None for _, lines in broken):
        broken = []
    bottom = top + PLOT + LINE * (max((len(lines or ()) for _, lines in broken), default=1) - 1)
    parts = [legend, _y_axis(up, y_axis, top), _x_axis([] if broken else under, x_label, bottom)]
    for x, lines in broken:
        parts += [_text(x, top + PLOT + 16 + LINE * i, line) for i, line in enumerate(lines or ())]
    for k, s in enumerate(series):
        for i, value in enumerate(s.values):
            x, y = centres[i] + (k - len(series) / 2) * width, up(value)
            parts.append(
                f'<rect class="bar {escape(s.style)}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(0.5, width - 1):.1f}" '
                f'height="{up(0) - y:.1f}"><title>{escape(s.label)}, {escape(ticks[i])}: {y_axis.text(value)}</title>'
                "</rect>"
            )
            if s.low is not None and s.high is not None:
                parts.append(_whisker(x + width / 2, up(s.low[i]), up(s.high[i])))
    return _svg(title, bottom + BOTTOM, parts)


def heatmap(
    title: str,
    axes: tuple[str, str, str],
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    style: str,
    full: float | None = None,
) -> Markup:
    """A row a label; a cell's opacity is its value over ``full``, or over the largest. None leaves a hole.

    Args:
        axes: what rows, columns and colours are.
    """
    row_label, column_label, shown = axes
    top, largest = 32.0, full or max((v for _, row in rows for v in row if v is not None), default=1.0) or 1.0
    cell = max(6.0, min(30.0, 260 / len(rows)))
    wide = (WIDTH - LEFT - RIGHT) / len(columns)
    parts = [_text(LEFT - 6, top - 9, row_label, "end"), *_colours(shown, largest, style, top - 9)]
    widest = max((text_width(number(v)) for _, row in rows for v in row if v is not None), default=0.0)
    written = wide >= widest + 4 and cell >= LINE
    every = math.ceil(len(rows) / max(1, math.floor(len(rows) * cell / LINE)))
    for r, (label, values) in enumerate(rows):
        y = top + r * cell
        if r % every == 0:
            parts.append(_text(LEFT - 6, y + cell / 2 + 4, label, "end"))
        for c, value in enumerate(values):
            if value is None:
                continue
            x = LEFT + c * wide
            parts.append(
                f'<rect class="cell {escape(style)}" x="{x:.1f}" y="{y:.1f}" width="{wide - 0.6:.2f}" '
                f'height="{cell - 0.6:.2f}" fill-opacity="{min(1.0, max(0.0, value / largest)):.3f}">'
                f"<title>{escape(label)}, {escape(columns[c])}: {number(value)}</title></rect>"
            )
            if written:
                parts.append(_text(x + wide / 2, y + cell / 2 + 4, number(value), style="tick on"))
    bottom = top + len(rows) * cell
    centres = [(LEFT + (c + 0.5) * wide, column) for c, column in enumerate(columns)]
    parts += _x_axis(centres, column_label, bottom)
    return _svg(title, bottom + BOTTOM, parts)


def _colours(shown: str, largest: float, style: str, base: float) -> list[str]:
    """What a heatmap's colours mean, from 0 to the largest, above its right end."""
    x, side = WIDTH - RIGHT - text_width(number(largest)) - 4, 14
    parts = [_text(WIDTH - RIGHT, base, number(largest), "end")]
    for step in range(STEPS, -1, -1):
        x -= side
        parts.append(
            f'<rect class="scale {escape(style)}" x="{x:.1f}" y="{base - 11:.1f}" width="{side}" height="{side}" '
            f'fill-opacity="{step / STEPS:.2f}"/>'
        )
    return [*parts, _text(x - 5, base, f"{shown}: 0", "end")]


class _Scale:
    """Values to pixels between ``start`` and ``end``, over a range widened to its ticks unless ``tight``."""

    def __init__(self, axis: Axis, low: float, high: float, start: float, end: float, tight: bool = False) -> None:
        self._log, self._start, self._end = axis.log, start, end
        if axis.log:
            low, high = low / 1.25, high * 1.25
            marks = _log_marks(low, high)
        else:
            low, high = (low if tight else min(0.0, low)), (axis.high if axis.high is not None else high)
            high = high if high > low else low + 1.0
            step = _round_step((high - low) / 4)
            marks = [step * i for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]
            if tight:
                marks = [m for m in marks if low - 1e-9 <= m <= high + 1e-9]
            else:
                low, high = marks[0], marks[-1]
        self._low, self._high = low, high
        given = axis.ticks if axis.ticks is not None else [(m, axis.text(m)) for m in marks]
        self.ticks = [(value, text) for value, text in given if low <= value <= high]

    def __call__(self, value: float) -> float:
        if self._log:
            share = math.log(value / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return self._start + (self._end - self._start) * min(1.0, max(0.0, share))


def _log_marks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)):
        marks = [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        if len(marks) >= 4:
            return marks
    return marks


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999999)


def _y_axis(up: _Scale, axis: Axis, top: float) -> str:
    marks = [
        f'<path class="grid" d="M{LEFT} {up(v):.1f}H{WIDTH - RIGHT}"/>' + _text(LEFT - 5, up(v) + 4, text, "end")
        for v, text in up.ticks
    ]
    return "".join([*marks, _text(2, top - 12, axis.label, "start")])


def _x_axis(ticks: Sequence[tuple[float, str]], label: str, bottom: float) -> str:
    x = min(MIDDLE, WIDTH - text_width(label) / 2)
    return "".join([*_thinned(ticks, bottom + 16), _text(x, bottom + 33, label)])


def _thinned(ticks: Sequence[tuple[float, str]], y: float) -> list[str]:
    """Tick texts in a row: as many as fit, evenly left out."""
    kept: list[tuple[float, str]] = []
    for step in range(1, len(ticks) + 1):
        kept = [(min(x, WIDTH - text_width(t) / 2), t) for x, t in ticks[::step]]
        if _fits(kept):
            break
    return [_text(x, y, t) for x, t in kept]


def _fits(ticks: Sequence[tuple[float, str]]) -> bool:
    """Whether no tick text comes near the next one."""
    return all(x + text_width(t) / 2 + 4 <= right - text_width(u) / 2 for (x, t), (right, u) in pairwise(ticks))


def _broken(text: str, wide: float) -> list[str] | None:
    """The text in lines that are at most so wide; None where a word is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= wide:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if all(text_width(line) <= wide for line in lines) else None


def _whisker(x: float, low: float, high: float) -> str:
    return f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(entries: Sequence[tuple[str, str]]) -> tuple[str, float]:
    """The entries in as many rows as they need, and where the plot begins below them and the y axis's label."""
    parts, x, y = [], 2.0, 4.0
    for label, style in entries:
        wide = 16 + text_width(label)
        if x > 2 and x + wide > WIDTH:
            x, y = 2.0, y + LINE
        parts.append(f'<rect class="mark {escape(style)}" x="{x:.0f}" y="{y:.0f}" width="10" height="10" rx="2"/>')
        parts.append(_text(x + 15, y + 9.5, label, "start"))
        x += wide + 12
    return "".join(parts), y + LINE + 27


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    # The parts are ours; every text that came from outside was escaped where it was put in.
    name = escape(title)
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}"><title>{name}</title>'
        f"{''.join(parts)}</svg>"
    )

"""Where the names of a chart's points go, so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FONT = 12  # pixels, of chart.css
LONGEST = 170  # pixels of a name; the rest is cut off
NEAR = 16  # distance from the point beyond which a line leads to the name
FAR = 86  # the longest such distance
MANY = 14  # names, beyond which lines to them would be a tangle: each stands beside its point or nowhere
# Widths of letters in units of the font size, in a wide font (DejaVu Sans); others are narrower.
WIDTHS = {
    **dict.fromkeys("iljI|'.,:; ", 0.34),
    **dict.fromkeys('ftr()[]/-"', 0.46),
    **dict.fromkeys("cszJ_", 0.55),
    **dict.fromkeys("abdeghknopquvxyLTFS0123456789", 0.64),
    **dict.fromkeys("ABCDEGHKNOPQRUVXYZ+=<>w", 0.82),
}

Anchor = Literal["start", "middle", "end"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A text's box, where in it the text is fixed, and the line from its point where it is not beside it."""

    text: str
    box: Box
    anchor: Anchor
    leader: tuple[Point, Point] | None


def text_width(text: str) -> float:
    """Pixels that a text of a chart takes at most."""
    return FONT * sum(WIDTHS.get(letter, 1.0) for letter in text)


def place(
    names: Sequence[tuple[float, float, str]], dots: Sequence[Box], lines: Sequence[Box], frame: Box
) -> list[Label]:
    """Each name near its point (x, y), inside the frame, where it covers no dot, no other name and, if there is
    room, no line. A name for which there is no room is left out.
    """
    taken, found = list(dots), []
    longest = NEAR if len(names) > MANY else FAR
    for x, y, name in names:
        text = _cut(name)
        around = [p for p in _around(x, y, text_width(text), longest) if _inside(p[1], frame)]
        for obstacles in ([*taken, *lines], taken):
            free = next((p for p in around if not any(_overlap(p[1], box) for box in obstacles)), None)
            if free:
                reach, box, anchor = free
                edge = box[1] if box[1] > y else box[3] if box[3] < y else (box[1] + box[3]) / 2
                leader = ((x, y), (min(max(x, box[0]), box[2]), edge)) if reach > NEAR else None
                found.append(Label(text, box, anchor, leader))
                taken.append(box)
                break
    return found


def along(start: Point, end: Point) -> list[Box]:
    """Small boxes along a line."""
    steps = max(1, math.ceil(math.dist(start, end) / 5))
    points = [[a + (b - a) * i / steps for a, b in zip(start, end, strict=True)] for i in range(steps + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in points]


def _cut(name: str) -> str:
    if text_width(name) <= LONGEST:
        return name
    return next(cut for end in range(len(name), 0, -1) if text_width(cut := name[:end].rstrip() + "…") <= LONGEST)


def _around(x: float, y: float, wide: float, longest: float) -> Iterator[tuple[float, Box, Anchor]]:
    """Boxes for a text beside a point, nearest first, the sides before above and below; texts grow away from it:
    (distance, box, anchor).
    """
    for reach in (r for r in (8, NEAR, 26, 38, 52, 68, FAR) if r <= longest):
        for turn in (math.pi * k / 6 for k in (0, 6, 3, 9, 1, 11, 5, 7, 2, 10, 4, 8)):
            px, py = x + reach * math.cos(turn), y - reach * math.sin(turn)
            anchor: Anchor = "start" if px > x + 1 else "end" if px < x - 1 else "middle"
            left = px - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            yield reach, (left, py - 6.5, left + wide, py + 6.5), anchor


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

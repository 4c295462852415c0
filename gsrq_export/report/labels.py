"""Where the names of a chart's points go, so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LETTER = 6.6  # width of a letter at the font size of chart.css, in a wide font
LONGEST = 22  # letters of a name; the rest is cut off
NEAR = 16  # distance from the point beyond which a line leads to the name

Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A text's box, and the line from its point where it is not beside it."""

    text: str
    box: Box
    leader: tuple[Point, Point] | None


def place(
    names: Sequence[tuple[float, float, str]], dots: Sequence[Box], lines: Sequence[Box], frame: Box
) -> list[Label]:
    """Each name near its point (x, y), inside the frame, where it covers no dot, no other name and, if there is
    room, no line. A name for which there is no room is left out.
    """
    taken, found = list(dots), []
    for x, y, name in names:
        text = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        around = [p for p in _around(x, y, len(text) * LETTER) if _inside(p[1], frame)]
        for obstacles in ([*taken, *lines], taken):
            free = next((p for p in around if not any(_overlap(p[1], box) for box in obstacles)), None)
            if free:
                reach, box = free
                edge = box[1] if box[1] > y else box[3] if box[3] < y else (box[1] + box[3]) / 2
                leader = ((x, y), (min(max(x, box[0]), box[2]), edge)) if reach > NEAR else None
                found.append(Label(text, box, leader))
                taken.append(box)
                break
    return found


def along(start: Point, end: Point) -> list[Box]:
    """Small boxes along a line."""
    steps = max(1, math.ceil(math.dist(start, end) / 5))
    points = [[a + (b - a) * i / steps for a, b in zip(start, end, strict=True)] for i in range(steps + 1)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in points]


def _around(x: float, y: float, wide: float) -> Iterator[tuple[float, Box]]:
    """Boxes for a text beside a point, nearest first, the sides before above and below: (distance, box)."""
    for reach in (8, NEAR, 26, 38, 52, 68, 86):
        for turn in (math.pi * k / 6 for k in (0, 6, 3, 9, 1, 11, 5, 7, 2, 10, 4, 8)):
            px, py = x + reach * math.cos(turn), y - reach * math.sin(turn)
            left = px if px > x + 1 else px - wide if px < x - 1 else px - wide / 2
            yield reach, (left, py - 6, left + wide, py + 6)


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

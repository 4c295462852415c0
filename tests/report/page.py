"""A report's page taken apart."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

MARKS = ("polyline", "circle", "rect", "path")
WAYS_OUT = ("src", "href", "xlink:href", "action", "srcset", "data", "poster", "background", "formaction", "ping")


class Page(HTMLParser):
    """Tags, attributes that could load or lead somewhere, event handlers, text, and the charts as XML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.charts = {c.attrib["aria-label"]: c for c in map(ET.fromstring, re.findall(r"<svg.*?</svg>", text, re.S))}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "rect", "circle", "path", "polyline"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in WAYS_OUT]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "circle"):  # these hold a title, or are closed in themselves
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def data_marks(chart: ET.Element) -> list[ET.Element]:
    """What stands for data in a chart: not the grid, the legend or whiskers."""
    return [
        e
        for e in chart.iter()
        if e.tag in MARKS and {"line", "dot", "bar", "cell"} & set(e.attrib.get("class", "").split())
    ]


def texts(chart: ET.Element) -> list[ET.Element]:
    return [e for e in chart.iter() if e.tag == "text"]


def titles(chart: ET.Element) -> dict[str, ET.Element]:
    """Marks by their tooltip."""
    return {t.text or "": e for e in chart.iter() for t in e.findall("title") if e is not chart}

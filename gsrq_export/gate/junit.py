"""JUnit XML of a report: a test case a gate, its unrounded figures as properties."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from gsrq_export.gate.verdict import GateReport, Verdict
from gsrq_export.stages.storage import write_atomic

_ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # of XML 1.0


def junit_xml(report: GateReport) -> str:
    """REGRESSION and ANOMALOUS are failures, INCOMPLETE is an error."""
    failed = sum(r.verdict in (Verdict.REGRESSION, Verdict.ANOMALOUS) for r in report.results)
    broken = sum(r.verdict is Verdict.INCOMPLETE for r in report.results)
    counts = {"tests": str(len(report.results)), "failures": str(failed), "errors": str(broken)}
    seconds = f"{report.seconds:.3f}"
    root = ET.Element("testsuites", {"name": "gsrq regress", **counts, "time": seconds})
    suite = ET.SubElement(root, "testsuite", {"name": "gsrq regress", **counts, "skipped": "0", "time": seconds})
    _properties(suite, {"verdict": report.verdict.name, "artifact": report.artifact, **report.properties})
    for result in report.results:
        case = ET.SubElement(suite, "testcase", {"classname": "gsrq.regress", "name": result.name, "time": "0"})
        figures = {name: repr(value) for name, value in result.figures.items()}
        _properties(case, {"verdict": result.verdict.name, "unit": result.unit, **figures})
        text = _clean(result.detail)
        if result.verdict is Verdict.ACCEPT:
            ET.SubElement(case, "system-out").text = text
        else:
            kind = "error" if result.verdict is Verdict.INCOMPLETE else "failure"
            first = text.splitlines()[0] if text else ""
            ET.SubElement(case, kind, {"type": result.verdict.name, "message": first}).text = text
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def write_junit(path: Path, report: GateReport) -> None:
    """Whole or not at all."""
    write_atomic(path, lambda file: file.write_text(junit_xml(report), encoding="utf-8"))


def _properties(parent: ET.Element, values: dict[str, str]) -> None:
    properties = ET.SubElement(parent, "properties")
    for name, value in values.items():
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)

"""The documents' figures are those of the committed JSON, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys

from families import ROOT

from gsrq_export.recipe import parse_recipe


def test_tables_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_to_files() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_readmes_recipe_is_sound() -> None:
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert text is not None
    assert parse_recipe(text[1], "README.md", ROOT).nominal_bits == 1.0

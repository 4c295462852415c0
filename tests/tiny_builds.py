"""`gsrq build --tiny` in a process of its own, so that two can run at a time; most of a build is one thread's work."""

from __future__ import annotations

import time

from click.testing import CliRunner


def build(recipe: str, out: str) -> tuple[int, str, float]:
    """Exit status, output with the error, seconds."""
    from gsrq_export.commands.app import cli

    started = time.monotonic()
    result = CliRunner().invoke(cli, ["build", "--recipe", recipe, "--tiny", "--out", out])
    return result.exit_code, f"{result.output}\n{result.exception}", time.monotonic() - started

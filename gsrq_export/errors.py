"""Errors that a user can act on."""

from __future__ import annotations


class GsrqError(Exception):
    """Bad input or an impossible request; the CLI prints it as one line and exits with status 2.

    Args:
        problem: what is wrong, naming the field and the value.
        mend: what the user can do about it.
    """

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(f"{problem}\n  mend: {mend}" if mend else problem)
        self.problem = problem
        self.mend = mend


class UnsupportedModelError(GsrqError):
    """The model's attention cannot be rewritten; nothing has been written."""


class ArtifactError(GsrqError):
    """An artifact is damaged, incomplete, of another schema, or reaches outside its directory."""

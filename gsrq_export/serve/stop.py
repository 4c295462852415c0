"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from gsrq_export.errors import GsrqError

MOST, LONGEST = 16, 256


class StopStrings:
    """Passes text on until a stop string appears; text that may be the beginning of one is held back.

    Raises:
        GsrqError: over MOST strings, an empty one, or one of over LONGEST characters.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        if len(strings) > MOST:
            raise GsrqError(f"stop: {len(strings)} strings", f"use at most {MOST}")
        for string in strings:
            if not 1 <= len(string) <= LONGEST:
                raise GsrqError(f"stop: a string of {len(string)} characters", f"use 1 to {LONGEST} characters")
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that is certain now, up to the earliest stop string; then ``stopped`` is set."""
        text = self._held + piece
        found = [at for at in map(text.find, self._strings) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((self._overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the text's end."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)

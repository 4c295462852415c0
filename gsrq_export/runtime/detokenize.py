"""Token ids to text, a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are not (yet) UTF-8
HOLD = 8  # tokens held back for one character at most: enough for any, so a really broken one gets out


class Detokenizer:
    """Text of a growing token sequence, cut only where characters end.

    A byte-level token may hold part of a character, and a token's text may depend on the one before it (a
    leading space): so each piece is the difference of two decodings that share their first tokens.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-HOLD:]
        self._from = 0  # first token of the context of the next piece
        self._done = len(self._ids)  # tokens whose text is out

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, after = self._decode(self._done), self._decode(len(self._ids))
        if after.endswith(UNFINISHED) and len(self._ids) - self._done < HOLD:
            return ""
        return self._advance(before, after)

    def finish(self) -> str:
        """What is left at the end, without the bytes of a character that never came to its end."""
        before, after = self._decode(self._done), self._decode(len(self._ids))
        return self._advance(before, after).rstrip(UNFINISHED)

    def _advance(self, before: str, after: str) -> str:
        self._from, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _decode(self, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[self._from : stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

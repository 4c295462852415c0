"""A request to the engine and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from gsrq_export.runtime.generate import Sampling

Finish = Literal["eos", "stop_string", "max_new_tokens", "max_length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: text, or token ids.
        max_new_tokens: None for the server's default.
        stop: strings that end the text; they are not part of it.
    """

    prompt: str | list[int]
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """A piece of the answer; the last one has ``finish``.

    Attributes:
        text: what is new; may be empty.
        tokens: ids that are new, without the eos.
        new_tokens: ids so far.
        error: the reason, with finish "error".
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    finish: Finish | None = None
    error: str = ""


Listener = Callable[[Event], None]

"""What a server accepts; everything beyond is refused with a reason, before any work."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gsrq_export.errors import GsrqError

MOST = 1 << 24


class QueueFullError(GsrqError):
    """The server has as much work as it takes; the same request may succeed later."""


@dataclass(frozen=True)
class Limits:
    """Of one engine.

    Attributes:
        max_sequences: sequences that live in the cache at once (slots).
        max_queue: requests that wait for a slot.
        max_new_tokens: of one request.
        default_new_tokens: of a request that names none.
        max_prompt_tokens: 0 for what the artifact's max_length allows.
        cache_pages: pages of coded tokens that all slots share, a page holding one block of the cache rule in all
            layers; 0 for as many as all slots at their full length need.
    """

    max_sequences: int = 32
    max_queue: int = 256
    max_new_tokens: int = 4096
    default_new_tokens: int = 128
    max_prompt_tokens: int = 0
    cache_pages: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name in ("max_queue", "max_prompt_tokens", "cache_pages") else 1
            value = getattr(self, field.name)
            if type(value) is not int or not least <= value <= MOST:
                raise GsrqError(
                    f"{field.name}: {value!r} is not a whole number in {least} .. {MOST}", "correct the setting"
                )
        if self.default_new_tokens > self.max_new_tokens:
            raise GsrqError(
                f"default_new_tokens: {self.default_new_tokens} exceeds max_new_tokens {self.max_new_tokens}",
                "lower the default or raise the limit",
            )

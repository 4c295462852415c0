"""What the engine counts, under the names that Prometheus shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    kind: Literal["gauge", "counter"]
    help: str


MEASURES = {
    "gsrq_slots": Measure("gauge", "Sequences that fit the cache at once"),
    "gsrq_slots_used": Measure("gauge", "Sequences in the cache"),
    "gsrq_queue": Measure("gauge", "Requests that wait for a slot"),
    "gsrq_cache_pages": Measure("gauge", "Pages of coded tokens that all slots share"),
    "gsrq_cache_pages_reserved": Measure("gauge", "Pages set aside for the sequences in the cache"),
    "gsrq_cache_pages_used": Measure("gauge", "Pages that hold coded tokens"),
    "gsrq_cache_page_bytes": Measure("gauge", "Bytes of a page"),
    "gsrq_requests_total": Measure("counter", "Requests accepted"),
    "gsrq_refused_total": Measure("counter", "Requests refused"),
    "gsrq_finished_total": Measure("counter", "Requests that came to their end"),
    "gsrq_cancelled_total": Measure("counter", "Requests whose client went away"),
    "gsrq_failed_total": Measure("counter", "Requests that failed"),
    "gsrq_prompt_tokens_total": Measure("counter", "Prompt tokens put into the cache"),
    "gsrq_new_tokens_total": Measure("counter", "Tokens generated"),
    "gsrq_decode_steps_total": Measure("counter", "Runs of the graph for decoding"),
    "gsrq_first_token_seconds_total": Measure("counter", "Seconds from request to first token, all requests"),
    "gsrq_first_tokens_total": Measure("counter", "Requests that got a first token"),
}


class Counters:
    """Values by name; only the engine's lock-holder writes."""

    def __init__(self) -> None:
        self.values: dict[str, float] = dict.fromkeys(MEASURES, 0.0)

    def add(self, name: str, by: float = 1.0) -> None:
        self.values[name] += by

"""The engine: text equal to `gsrq generate`, slots that come back, limits, stop strings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_artifact import MAX_LENGTH, PROMPTS, generated, served_artifact
from tiny_artifact import tiny_artifact

from gsrq_export import GsrqError
from gsrq_export.runtime.generate import Sampling, load_eos, load_tokenizer
from gsrq_export.runtime.metadata import PARTS
from gsrq_export.runtime.session import OrtModel
from gsrq_export.serve.engine import Engine
from gsrq_export.serve.limits import Limits, QueueFullError
from gsrq_export.serve.request import Event, Request
from gsrq_export.serve.slots import SlotCache
from gsrq_export.serve.stop import StopStrings


def start(limits: Limits) -> Engine:
    path = served_artifact()
    return Engine(OrtModel(path, 1), load_tokenizer(path), load_eos(path), limits)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = start(Limits(max_sequences=8, max_queue=40, max_new_tokens=400))
    yield made
    made.close()


def idle(engine: Engine) -> dict[str, float]:
    """The metrics, once nothing is left to do."""
    for _ in range(500):
        found = engine.metrics()
        if not found["gsrq_slots_used"] and not found["gsrq_queue"]:
            return found
        time.sleep(0.01)
    raise AssertionError(engine.metrics())


def test_batched_text_is_the_single_ones(engine: Engine) -> None:
    """32 requests of different lengths through 8 slots, greedy and sampled."""
    requests = [
        Request(p, 8 + i, Sampling(0.8, 20, 0.9, seed=i) if i % 4 == 3 else Sampling()) for i, p in enumerate(PROMPTS)
    ]
    events: list[list[Event]] = [[] for _ in requests]
    made = [engine.submit(r, e.append) for r, e in zip(requests, events, strict=True)]
    assert all(sequence.done.wait(60) for sequence in made)
    for request, got in zip(requests, events, strict=True):
        assert isinstance(request.prompt, str)
        assert request.max_new_tokens is not None
        text, tokens, stop = generated(request.prompt, request.max_new_tokens, request.sampling)
        assert "".join(e.text for e in got) == text
        assert sum((e.tokens for e in got), ()) == tokens
        assert [e.finish for e in got] == [None] * (len(got) - 1) + [stop]
        assert (got[-1].new_tokens, len(got) > 3) == (len(tokens), True)
    after = idle(engine)
    assert after["gsrq_cache_pages_used"] == after["gsrq_cache_pages_reserved"] == 0
    assert after["gsrq_decode_steps_total"] < after["gsrq_new_tokens_total"] / 3, "they ran together"


def test_the_length_limit(engine: Engine) -> None:
    events: list[Event] = []
    engine.submit(Request([5] * (MAX_LENGTH - 2), 50), events.append).done.wait(30)
    assert (events[-1].finish, events[-1].new_tokens) == ("max_length", 3)


def test_cancelled_sequences_leave(engine: Engine) -> None:
    before = idle(engine)
    gone = threading.Event()
    first: list[Event] = []
    made = [engine.submit(Request(p, 200), first.append, gone.is_set) for p in PROMPTS[:12]]
    while len(first) < 30:
        time.sleep(0.005)
    made[3].cancel()
    assert made[3].done.wait(5)
    gone.set()
    assert all(sequence.done.wait(5) for sequence in made)
    after = idle(engine)
    assert after["gsrq_cancelled_total"] - before["gsrq_cancelled_total"] >= 8
    assert after["gsrq_cache_pages_used"] == after["gsrq_cache_pages_reserved"] == 0
    text, _, _ = generated(PROMPTS[9], 17)
    got: list[Event] = []
    engine.submit(Request(PROMPTS[9], 17), got.append).done.wait(10)
    assert "".join(e.text for e in got) == text, "a slot that was left behind does no harm"


def test_a_listener_that_raises_ends_its_sequence_alone(engine: Engine) -> None:
    def broken(event: Event) -> None:
        raise OSError("the pipe is gone")

    got: list[Event] = []
    bad = engine.submit(Request(PROMPTS[0], 300), broken)
    good = engine.submit(Request(PROMPTS[1], 12), got.append)
    assert bad.done.wait(5)
    assert good.done.wait(5)
    assert "".join(e.text for e in got) == generated(PROMPTS[1], 12)[0]


def test_stop_strings_end_the_text(engine: Engine) -> None:
    text, _, _ = generated(PROMPTS[4], 40)
    stop = text[20:26]
    got: list[Event] = []
    engine.submit(Request(PROMPTS[4], 40, stop=(stop, "never seen")), got.append).done.wait(10)
    assert "".join(e.text for e in got) == text[: text.index(stop)]
    assert got[-1].finish == "stop_string"


def test_refusals(engine: Engine) -> None:
    before = engine.metrics()["gsrq_refused_total"]
    cases: list[tuple[Request, str]] = [
        (Request("", 5), "prompt: it is empty"),
        (Request("x", 0), "max_tokens: 0"),
        (Request("x", 1 << 40), "max_tokens: 1099511627776"),
        (Request("word " * 2000, 5), "tokens exceed the limit of 320"),
        (Request("x" * 1_000_000, 5), "1000000 characters"),
        (Request([1, 1 << 30], 5), "token 1073741824 is outside the vocabulary"),
        (Request("x", 5, stop=("",)), "stop: a string of 0"),
        (Request("x", 5, stop=("a",) * 17), "stop: 17 strings"),
    ]
    for request, message in cases:
        with pytest.raises(GsrqError, match=message):
            engine.submit(request, print)
    assert engine.metrics()["gsrq_refused_total"] - before == len(cases)
    for values, message in (
        ({"max_sequences": 0}, "max_sequences: 0"),
        ({"max_queue": -1}, "max_queue: -1"),
        ({"default_new_tokens": 9, "max_new_tokens": 8}, "default_new_tokens: 9"),
    ):
        with pytest.raises(GsrqError, match=message):
            Limits(**values)


def test_more_than_all_pages_is_refused() -> None:
    engine = start(Limits(max_sequences=1, cache_pages=1))
    with pytest.raises(GsrqError, match=r"need 13 cache pages of 1"):
        engine.submit(Request([7] * 200, 30), print)
    engine.close()


def test_a_full_queue_and_few_pages() -> None:
    engine = start(Limits(max_sequences=4, max_queue=1, cache_pages=20))
    try:
        # Each reserves 13 pages: one at a time fits 20, though 4 slots are free.
        got: list[list[Event]] = [[] for _ in range(5)]
        made = [engine.submit(Request([7] * 200, 30), e.append) for e in got]
        with pytest.raises(QueueFullError, match="wait already"):
            engine.submit(Request([7] * 200, 30), print)
        most = 0
        while not all(s.done.is_set() for s in made):
            seen = engine.metrics()
            most = max(most, int(seen["gsrq_slots_used"]))
            assert seen["gsrq_cache_pages_reserved"] <= 20
        assert most == 1
        assert len({tuple(e.text for e in events) for events in got}) == 1
    finally:
        engine.close()
    with pytest.raises(QueueFullError, match="shutting down"):
        engine.submit(Request("x"), print)


@pytest.mark.parametrize(("library", "by_head"), [("auto", False), (None, False), (None, True)])
def test_slots_are_neighbours_and_give_memory_back(library: str | None, by_head: bool) -> None:
    path = tiny_artifact(codes_by_head=True).path if by_head else served_artifact()
    model = OrtModel(path, 1, library)  # type: ignore[arg-type]
    cache = SlotCache(model, 6)
    prompts = [list(range(3, 3 + n)) for n in (60, 45, 70)]
    for slot, prompt in enumerate(prompts):
        cache.run(slot + 1, [prompt])
    alone = OrtModel(path, 1, library)  # type: ignore[arg-type]
    before = [cache.read(3, f"0.{part}") for part in PARTS]
    cache.move(3, 1)
    for old, part in zip(before, PARTS, strict=True):
        np.testing.assert_array_equal(cache.read(1, f"0.{part}"), old)
    assert cache.lengths.tolist() == [0, 70, 45, 0, 0, 0]
    assert [cache.pages(int(n)) for n in cache.lengths] == ([0, 7, 4, 0, 0, 0] if by_head else [0, 3, 1, 0, 0, 0])
    logits = cache.run(1, [[9], []])
    alone.prefill([prompts[2]])
    np.testing.assert_array_equal(logits[0], alone.step([9])[0])


def _resident() -> int:
    fields = Path("/proc/self/smaps_rollup").read_text().split()
    return int(fields[fields.index("Rss:") + 1]) * 1024


def test_released_memory_goes_back_to_the_system() -> None:
    cache = SlotCache(OrtModel(served_artifact(), 1), 400)
    empty = _resident()
    for tensor in cache._tensors.values():
        tensor[:] = 1
    full = _resident()
    assert full - empty > 0.9 * cache.nbytes > 20e6, "only what is written takes memory"
    for slot in range(400):
        cache.release(slot)
    # Pages that two slots share stay: at most one a slot and tensor.
    assert full - _resident() > cache.nbytes - 400 * len(cache._tensors) * 4096 - 4e6


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces(text: str, strings: list[str], data: st.DataObject) -> None:
    stop = StopStrings(strings)
    out, at = "", 0
    while at < len(text) and not stop.stopped:
        size = data.draw(st.integers(1, 5))
        out += stop.add(text[at : at + size])
        at += size
    out += stop.finish()
    # The oracle: the earliest end of a stop string, piece borders aside, decides how far is read.
    found = [text[:at].find(s) for s in strings if s in text[:at]]
    assert stop.stopped == bool(found)
    assert out == (text[: min(found)] if found else text)

"""Continuous batching: sequences enter and leave the batch between two runs of the graph.

One thread owns the cache. Each of its rounds drops the cancelled, admits from the queue in order of arrival, runs
prompts for up to PREFILL_CHUNK tokens, then one decode step of all sequences that have a token to go on from. Sequences
lie in neighbouring slots, so one run covers them; when one leaves, the last takes its slot. A sequence's rows
are computed one by one, so on a CPU its text is the same, bit for bit, whoever else is in the batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.runtime.detokenize import Detokenizer
from gsrq_export.runtime.session import PREFILL_CHUNK, OrtModel
from gsrq_export.serve.limits import Limits, QueueFullError
from gsrq_export.serve.metrics import Counters
from gsrq_export.serve.request import Event, Finish, Listener, Request
from gsrq_export.serve.slots import SlotCache
from gsrq_export.serve.stop import StopStrings

POLL_SECONDS = 0.1  # between two questions whether a client is still there
REPORT_SECONDS = 0.25
CHARACTERS_A_TOKEN = 64  # a prompt of more than so many cannot fit, and is not worth tokenizing

log = logging.getLogger(__name__)


class Sequence:
    """A request on its way. ``cancel`` may be called from any thread."""

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        most: int,
        pages: int,
        tokenizer: Any,
        listener: Listener,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self.prompt, self.most, self.pages = prompt, most, pages
        self.sampling = request.sampling
        self.rng = np.random.default_rng(request.sampling.seed)
        self.text, self.stop = Detokenizer(tokenizer, prompt), StopStrings(request.stop)
        self.listener, self.is_cancelled = listener, is_cancelled
        self.made: list[int] = []
        self.told = 0  # ids already sent
        self.sent = 0  # prompt tokens in the cache
        self.since = self.polled = time.monotonic()
        self.cancelled = False
        self.done = threading.Event()

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def decoding(self) -> bool:
        return self.sent == len(self.prompt)

    def event(self, text: str, finish: Finish | None = None, error: str = "") -> Event:
        tokens = tuple(self.made[self.told :])
        self.told = len(self.made)
        return Event(text, tokens, len(self.prompt), len(self.made), finish, error)


class Engine:
    """Serves one artifact.

    Args:
        model: of runtime.session, on the CPU.
        eos: ids that end a text.
        report: gets the metrics by name, some times a second and whenever the engine falls idle; in its thread.
        cache: of the model's kind; None for the coded cache.
    Raises:
        GsrqError: limits that the artifact cannot keep.
    """

    def __init__(
        self,
        model: OrtModel,
        tokenizer: Any,
        eos: frozenset[int],
        limits: Limits | None = None,
        report: Callable[[dict[str, float]], None] | None = None,
        cache: SlotCache | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._model, self._tokenizer, self._eos = model, tokenizer, eos
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # set once: changing these while another thread decodes is refused by the library
            backend.no_truncation()
            backend.no_padding()
        self.cache = cache or SlotCache(model, self.limits.max_sequences)
        full = self.cache.pages(model.max_length)
        self.pages = self.limits.cache_pages or full * self.limits.max_sequences
        self.max_prompt = min(self.limits.max_prompt_tokens or model.max_length, model.max_length)
        self._live: list[Sequence] = []  # by slot
        self._queue: deque[Sequence] = deque()
        self._counters = Counters()
        self._report, self._reported = report, 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="gsrq-engine", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, listener: Listener, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Sequence:
        """Queue a request.

        Args:
            listener: gets the events in the engine's thread; must not block. If it raises, the sequence is dropped.
            is_cancelled: asked some times a second, in the engine's thread.
        Raises:
            GsrqError: the request can never be served; nothing was queued.
            QueueFullError: not now.
        """
        try:
            sequence = self._check(request, listener, is_cancelled)
            with self._wake:
                if self._closing:
                    raise QueueFullError("the server is shutting down", "send the request to another")
                waiting = len(self._queue) - max(0, self.limits.max_sequences - len(self._live))
                if waiting >= self.limits.max_queue:
                    raise QueueFullError(f"{len(self._queue)} requests wait already", "try again later")
                self._queue.append(sequence)
                self._counters.add("gsrq_requests_total")
                self._wake.notify()
        except GsrqError:
            with self._wake:
                self._counters.add("gsrq_refused_total")
            raise
        return sequence

    def metrics(self) -> dict[str, float]:
        """By the names of serve.metrics."""
        with self._wake:
            live = list(self._live)
            return {
                **self._counters.values,
                "gsrq_slots": self.limits.max_sequences,
                "gsrq_slots_used": len(live),
                "gsrq_queue": len(self._queue),
                "gsrq_cache_pages": self.pages,
                "gsrq_cache_pages_reserved": sum(s.pages for s in live),
                "gsrq_cache_pages_used": sum(self.cache.pages(int(n)) for n in self.cache.lengths),
                "gsrq_cache_page_bytes": self.cache.page_bytes,
            }

    def close(self) -> None:
        """Cancel what is left and stop the thread."""
        with self._wake:
            self._closing = True
            for sequence in (*self._live, *self._queue):
                sequence.cancel()
            self._wake.notify()
        self._thread.join()

    def _check(self, request: Request, listener: Listener, is_cancelled: Callable[[], bool]) -> Sequence:
        limits, prompt = self.limits, request.prompt
        most = limits.default_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if not 1 <= most <= limits.max_new_tokens:
            raise GsrqError(f"max_tokens: {most} is not in 1 .. {limits.max_new_tokens}", "ask for less at a time")
        if isinstance(prompt, str):
            if len(prompt) > CHARACTERS_A_TOKEN * self.max_prompt:
                raise GsrqError(
                    f"prompt: {len(prompt)} characters, for at most {self.max_prompt} tokens", "shorten the prompt"
                )
            prompt = list(self._tokenizer.encode(prompt, verbose=False))
        if not prompt:
            raise GsrqError("prompt: it is empty", "give some text")
        if len(prompt) > self.max_prompt:
            raise GsrqError(f"prompt: {len(prompt)} tokens exceed the limit of {self.max_prompt}", "shorten the prompt")
        self._model.check([prompt])
        pages = self.cache.pages(min(len(prompt) + most, self._model.max_length))
        if pages > self.pages:
            raise GsrqError(
                f"prompt and max_tokens: {len(prompt)} + {most} tokens need {pages} cache pages of {self.pages}",
                "ask for less, or serve with more cache_pages",
            )
        return Sequence(request, prompt, most, pages, self._tokenizer, listener, is_cancelled)

    def _loop(self) -> None:
        while True:
            with self._wake:
                if not self._live and not self._queue and not self._closing:
                    self._tell()
                    self._wake.wait()
                if self._closing and not self._live and not self._queue:
                    break
            self._drop_cancelled()
            self._admit()
            self._prefill()
            self._decode()
            if time.monotonic() - self._reported > REPORT_SECONDS:
                self._tell()
        self._tell()

    def _tell(self) -> None:
        self._reported = time.monotonic()
        if self._report is not None:
            with contextlib.suppress(Exception):  # whoever collects figures must not end the service
                self._report(self.metrics())

    def _drop_cancelled(self) -> None:
        now = time.monotonic()
        for sequence in (*self._live, *self._queue):
            if not sequence.cancelled and now - sequence.polled >= POLL_SECONDS:
                sequence.polled = now
                try:
                    sequence.cancelled = sequence.is_cancelled()
                except Exception:
                    log.exception("a client could not be asked whether it is there")
                    sequence.cancelled = True
            if sequence.cancelled:
                self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        with self._wake:
            reserved = sum(s.pages for s in self._live)
            # In order of arrival: a long request is not overtaken for ever by short ones.
            while self._queue and len(self._live) < self.limits.max_sequences:
                if reserved + self._queue[0].pages > self.pages:
                    break
                sequence = self._queue.popleft()
                reserved += sequence.pages
                self._live.append(sequence)

    def _prefill(self) -> None:
        budget = PREFILL_CHUNK
        for sequence in [s for s in self._live if not s.decoding]:
            while not sequence.decoding and budget > 0 and not sequence.cancelled:
                # With exact prefill a prompt must go in one call, see OrtModel.prefill.
                whole = self._model.metadata.exact_prefill
                size = len(sequence.prompt) if whole else PREFILL_CHUNK
                chunk = sequence.prompt[sequence.sent : sequence.sent + size]
                try:
                    logits = self.cache.run(self._live.index(sequence), [chunk])
                except Exception as error:
                    self._fail([sequence], error)
                    break
                sequence.sent += len(chunk)
                budget -= len(chunk)
                self._counters.add("gsrq_prompt_tokens_total", len(chunk))
                if sequence.decoding:
                    self._take(sequence, logits[0])

    def _decode(self) -> None:
        ready = [slot for slot, s in enumerate(self._live) if s.decoding]
        if not ready:
            return
        rows = self._live[ready[0] : ready[-1] + 1]
        try:
            logits = self.cache.run(ready[0], [[s.made[-1]] if s.decoding else [] for s in rows])
        except Exception as error:
            self._fail([s for s in rows if s.decoding], error)
            return
        self._counters.add("gsrq_decode_steps_total")
        for sequence, row in zip(rows, logits, strict=True):
            if sequence.decoding:
                self._take(sequence, row)

    def _take(self, sequence: Sequence, logits: Any) -> None:
        """Choose the next token and pass its text on; the order of tests is that of runtime.generate."""
        token = sequence.sampling.choose(logits, sequence.rng)
        if not sequence.made:
            self._counters.add("gsrq_first_token_seconds_total", time.monotonic() - sequence.since)
            self._counters.add("gsrq_first_tokens_total")
        if token in self._eos:
            self._finish(sequence, "eos")
            return
        sequence.made.append(token)
        self._counters.add("gsrq_new_tokens_total")
        piece = sequence.stop.add(sequence.text.add(token))
        if sequence.stop.stopped:
            self._finish(sequence, "stop_string", piece)
        elif len(sequence.made) == sequence.most:
            self._finish(sequence, "max_new_tokens", piece)
        elif len(sequence.prompt) + len(sequence.made) > self._model.max_length:
            self._finish(sequence, "max_length", piece)
        elif piece:
            self._send(sequence, sequence.event(piece))

    def _finish(self, sequence: Sequence, finish: Finish, piece: str = "", error: str = "") -> None:
        """The end of a sequence: its last event, and its slot given back."""
        if finish in ("eos", "max_new_tokens", "max_length"):
            piece += sequence.stop.add(sequence.text.finish())
            if sequence.stop.stopped:
                finish = "stop_string"
            else:
                piece += sequence.stop.finish()
        with self._wake:
            if sequence in self._queue:
                self._queue.remove(sequence)
            if sequence in self._live:
                slot, last = self._live.index(sequence), len(self._live) - 1
                if slot == last:
                    self.cache.release(slot)
                else:
                    self.cache.move(last, slot)
                    self._live[slot] = self._live[last]
                self._live.pop()
            outcome = {"cancelled": "cancelled", "error": "failed"}.get(finish, "finished")
            self._counters.add(f"gsrq_{outcome}_total")
        self._send(sequence, sequence.event(piece, finish, error))
        sequence.done.set()

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        log.exception("a run of the graph failed")
        for sequence in sequences:
            self._finish(sequence, "error", error=str(error) or type(error).__name__)

    def _send(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:
            log.exception("a client's events could not be delivered")
            sequence.cancel()

"""The harness: fits every method, evaluates every row the same way, and keeps what is done after each row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gsrq_export import __version__
from gsrq_export.baselines.attention import baseline
from gsrq_export.baselines.base import LayerCodecs, Method, effective_bits, nominal_bits
from gsrq_export.baselines.calibrate import families, fit_model, gradient_width, narrowed
from gsrq_export.compare.schema import (
    Comparison,
    Metrics,
    Prefill,
    Row,
    Seconds,
    Skipped,
    load_comparison,
    save_comparison,
)
from gsrq_export.compare.store import require_same
from gsrq_export.compare.subject import Ours, Subject, Tokenizer
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.fidelity import Record, fidelity, record
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.suite import evaluate
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.stages.keys import environment
from gsrq_export.stages.progress import Reporter

Wanted = tuple[str, str, bool, dict[str, Any]]  # id, label, ours, setting


def run_comparison(
    path: Path,
    subject: Subject,
    methods: Mapping[str, Method],
    ours: Sequence[Ours],
    prefills: Sequence[Prefill],
    reporter: Reporter,
    may_start: Callable[[], bool] = lambda: True,
) -> Comparison:
    """Measure what is not in the file yet; it is written after each row.

    Args:
        path: the file; rows that it has are kept.
        methods: rivals by id, see ``baselines.methods.chosen``.
        prefills: which modes each row is measured under.
        may_start: asked before each fit and each row; False ends the run early.
    Raises:
        GsrqError: the file is of another protocol, or has a row of another setting; codebooks that are not of this
            model; evaluation settings that do not fit it. All before the first row.
    """
    return _Run(path, subject, list(prefills), reporter, may_start).run(methods, ours)


class _Run:
    def __init__(
        self,
        path: Path,
        subject: Subject,
        prefills: list[Prefill],
        reporter: Reporter,
        may_start: Callable[[], bool],
    ) -> None:
        self.path, self.subject, self.prefills = path, subject, prefills
        self.reporter, self.may_start = reporter, may_start
        self.tokenizer = Tokenizer(subject.tokenizer)
        self._records: dict[str, Record] = {}
        protocol, here = subject.protocol(), {**environment(), "device": _device_name(subject.device)}
        self.found = Comparison(created_by=f"gsrq-export {__version__}", environment=here, protocol=protocol)
        if path.exists():
            before = load_comparison(path)
            require_same(protocol, before.protocol, str(path))
            changed = sorted(
                k for k in here.keys() | before.environment.keys() if here.get(k) != before.environment.get(k)
            )
            if changed and before.rows:
                reporter.line(f"{path}: earlier rows were made with another {', '.join(changed)}")
            self.found = _with(before, environment=here)

    def run(self, methods: Mapping[str, Method], ours: Sequence[Ours]) -> Comparison:
        for row in ours:
            row.check(self.subject)
            self._check_setting(row.id, row.setting())
        for id, method in methods.items():
            self._check_setting(id, identity(method))
        for prefill in self.prefills:
            if prefill not in self.found.unquantized:
                metrics = self._measure(TorchRunner(self.subject.model), prefill, "unquantized")
                self._keep(unquantized={**self.found.unquantized, prefill: metrics})
        for row in ours:
            if self._todo(row.id) and self.may_start():
                codecs = row.codecs(self.subject.device)
                with self._skipping(row.id, row.label):
                    self._rows((row.id, row.label, True, row.setting()), codecs, 0.0)
        todo = {id: method for id, method in methods.items() if self._todo(id) and self._fits(id, method)}
        if todo and self.may_start():
            self._rivals(todo)
        return self.found

    def _rivals(self, methods: Mapping[str, Method]) -> None:
        ids = {method: id for id, method in methods.items()}
        captured = self.subject.capture(gradient_width(list(ids)))
        length = self.subject.ids.shape[1]
        for family in families(list(ids)):
            if not self.may_start():
                return
            started, names = time.monotonic(), [ids[method] for method in family]
            self.reporter.line(f"fitting {', '.join(names)}")
            codecs: list[LayerCodecs] | None = None
            for method in family:
                with self._skipping(ids[method], method.label):
                    if codecs is None:
                        codecs = fit_model(captured, self.subject.spec, family[0], length, self.subject.device)
                    if self.may_start():
                        wanted = (ids[method], method.label, False, identity(method))
                        seconds = time.monotonic() - started if method is family[0] else 0.0
                        self._rows(wanted, narrowed(method, codecs), seconds)

    def _rows(self, wanted: Wanted, codecs: Sequence[LayerCodecs], fit_seconds: float) -> None:
        """Measure a fitted method under every mode that is not there yet."""
        subject, (id, label, ours, setting) = self.subject, wanted
        rule, dtype = subject.rule.cache_rule, getattr(torch, subject.rule.exact_dtype)
        points = self.found.protocol.serving
        bits = {p.key: effective_bits(subject.spec, codecs, rule, p.tokens, p.sequences) for p in points}
        self._record()
        for prefill in self._todo(id):
            started = time.monotonic()
            with baseline(
                subject.model,
                codecs,
                rule,
                exact_prefill=prefill == "exact",
                exact_dtype=dtype,
                prefill_once=True,
                spec=subject.spec,
            ):
                metrics = self._measure(TorchRunner(subject.model), prefill, id, self._records)
            row = Row(
                id=id,
                label=label,
                ours=ours,
                setting=setting,
                nominal_bits=nominal_bits(subject.spec, codecs),
                effective_bits=bits,
                prefill=prefill,
                seconds=Seconds(fit=round(fit_seconds, 2), evaluate=round(time.monotonic() - started, 2)),
                metrics=metrics,
            )
            skipped = [entry for entry in self.found.skipped if entry.id != id]
            self._keep(rows=[*self.found.rows, row], skipped=skipped)
            fit_seconds = 0.0

    def _record(self) -> None:
        """Lets the uncoded model continue each text that asks for fidelity, once a run."""
        for text in self.subject.texts:
            settings = text.settings
            if settings.fidelity and text.name not in self._records:
                ids = self.tokenizer.encode(text.content, add_special_tokens=False, verbose=False)
                runner = TorchRunner(self.subject.model)
                with self.reporter.task(f"unquantized, {text.name}: prompts", settings.fidelity.prompts) as task:
                    self._records[text.name] = record(
                        runner,
                        self.tokenizer,
                        ids,
                        settings.fidelity,
                        batch=settings.batch,
                        seed=settings.seed,
                        progress=task.advance,
                    )

    def _measure(
        self, runner: Runner, prefill: Prefill, label: str, records: Mapping[str, Record] | None = None
    ) -> Metrics:
        metrics: Metrics = {}
        for text in self.subject.texts:
            settings = text.of(prefill)
            with self.reporter.task(f"{label}, {prefill} prefill, {text.name}: windows and cases", settings.steps) as t:
                found = evaluate(runner, self.tokenizer, text.content, settings, t.advance)
            metrics[text.name] = dict(found)
            if records and text.name in records:
                metrics[text.name]["fidelity"] = fidelity(runner, records[text.name], batch=settings.batch)
        return metrics

    def _todo(self, id: str) -> list[Prefill]:
        return [prefill for prefill in self.prefills if self.found.row(id, prefill) is None]

    def _check_setting(self, id: str, setting: dict[str, Any]) -> None:
        for row in self.found.rows:
            if row.id == id and row.setting != setting:
                names = sorted(k for k in row.setting.keys() | setting.keys() if row.setting.get(k) != setting.get(k))
                was, now = ({k: values.get(k) for k in names} for values in (row.setting, setting))
                raise GsrqError(f"{self.path}: row {id} was made with {was}, now {now}", "name another --out")

    def _fits(self, id: str, method: Method) -> bool:
        with self._skipping(id, method.label):
            for layer in self.subject.spec.layers:
                method.check_heads(layer.num_kv_heads, layer.head_dim)
            return True
        return False

    @contextmanager
    def _skipping(self, id: str, label: str) -> Iterator[None]:
        """A row that cannot be made is reported, and the others go on."""
        try:
            yield
        except GsrqError as error:
            self.reporter.line(f"{id}: skipped: {error.problem}")
            others = [entry for entry in self.found.skipped if entry.id != id]
            self._keep(skipped=[*others, Skipped(id=id, label=label, reason=error.problem)])

    def _keep(self, **changes: Any) -> None:
        self.found = _with(self.found, **changes)
        save_comparison(self.path, self.found)


def identity(method: Method) -> dict[str, Any]:
    """A row's setting: the quantizer's class and its fields."""
    return {"quantizer": type(method).__name__, **asdict(method)}  # type: ignore[call-overload]


def _with(comparison: Comparison, **changes: Any) -> Comparison:
    return Comparison(**{**dict(comparison), **changes})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""compare.json: what every cache quantizer measured under one protocol. Schema 1.0.

Rows of one file can be held against each other, because all that must be equal for that is in its protocol; a file
of another protocol is refused, never mixed in. Metrics are whole evaluations (evaluate.suite.Evaluation as plain data),
so that what an evaluation learns to measure later is stored without a change here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gsrq_export.cache.rule import CacheRule
from gsrq_export.evaluate.suite import require_finite
from gsrq_export.json_document import read_document
from gsrq_export.stages.storage import write_atomic

SCHEMA: Final = "1.0"
KIND: Final = "gsrq comparison"
MAX_BYTES = 256 << 20

Prefill = Literal["coded", "exact"]
Metrics = dict[str, dict[str, Any]]  # text name -> Evaluation
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class ServingPoint(_Entry):
    """Where effective bits are counted: ``sequences`` of ``tokens`` each, which share the codebooks."""

    tokens: Positive
    sequences: Positive

    @property
    def key(self) -> str:
        """As in a row's ``effective_bits``: "8192x64"."""
        return f"{self.tokens}x{self.sequences}"


SERVING = tuple(ServingPoint(tokens=t, sequences=s) for t, s in ((2048, 1), (8192, 1), (8192, 64), (131072, 1)))


class Model(_Entry):
    """id: as the user named it, a directory's last part; weights_sha256: see model.loading.weight_hash."""

    id: str
    weights_sha256: Sha256


class Rule(_Entry):
    """Sinks, window and block in tokens, the same for every row; exact tokens are held in ``exact_dtype``."""

    sinks: Count
    window: Count
    block: Positive
    exact_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @property
    def cache_rule(self) -> CacheRule:
        return CacheRule(self.sinks, self.window, self.block)


class Calibration(_Entry):
    """sha256: of the calibration tokens, int64 little endian."""

    sequences: Positive
    sequence_length: Positive
    sha256: Sha256


class Text(_Entry):
    """An evaluation text.

    Attributes:
        name: its key in the rows' metrics.
        sha256: of its UTF-8 bytes.
        settings: of the evaluation (evaluate.suite.EvaluationSettings) without ``prompt_tokens``, which follow from the
            prefill and stand in the metrics.
    """

    name: str
    sha256: Sha256
    settings: dict[str, Any]


class Protocol(_Entry):
    """What all rows have in common, and what makes them comparable.

    Attributes:
        texts: the first one carries the parts that need one text only (recall, tasks).
        serving: where effective bits are counted.
    """

    model: Model
    rule: Rule
    calibration: Calibration
    texts: Annotated[list[Text], Field(min_length=1)]
    serving: Annotated[list[ServingPoint], Field(min_length=1)]


class Seconds(_Entry):
    """Wall time; ``fit`` is 0 for rows whose codebooks were given or trained together with a larger row's."""

    fit: Finite
    evaluate: Finite


class Row(_Entry):
    """One quantizer under one prefill mode.

    Attributes:
        id: stable: of baselines.methods, or ours.
        ours: whether its codebooks are the user's own, rather than a rival's or the published method's.
        setting: everything that identifies what was fitted.
        nominal_bits: codes, scales and norms of a coded token, an element, keys and values averaged.
        effective_bits: by serving point (``ServingPoint.key``): the same with exact slots and shared tensors.
        metrics: an evaluation a text.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+_-]*$")]
    label: str
    ours: bool
    setting: dict[str, Any]
    nominal_bits: Finite
    effective_bits: dict[str, Finite]
    prefill: Prefill
    seconds: Seconds
    metrics: Metrics


class Skipped(_Entry):
    """A method that was asked for and cannot code this model."""

    id: str
    label: str
    reason: str


class Comparison(_Entry):
    """The file.

    Attributes:
        environment: versions, code and device that it was made with.
        unquantized: by prefill mode (it decides which tokens are scored), the uncoded model's metrics.
        rows: at most one of an id and prefill mode.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    kind: Literal["gsrq comparison"] = KIND
    schema_version: Annotated[Literal["1.0"], Field(alias="schema")] = SCHEMA
    created_by: str
    environment: dict[str, str]
    protocol: Protocol
    unquantized: dict[Prefill, Metrics] = {}
    rows: list[Row] = []
    skipped: list[Skipped] = []

    @model_validator(mode="after")
    def _complete(self) -> Comparison:
        texts = [text.name for text in self.protocol.texts]
        points = [point.key for point in self.protocol.serving]
        seen: set[tuple[str, str]] = set()
        for where, metrics in self._all_metrics():
            if list(metrics) != texts:
                raise ValueError(f"{where} has metrics of {list(metrics)}, the protocol names {texts}")
        for row in self.rows:
            if list(row.effective_bits) != points:
                raise ValueError(f"row {row.id} has effective bits at {list(row.effective_bits)}, not at {points}")
            if row.prefill not in self.unquantized:
                raise ValueError(f"row {row.id}: the unquantized model was not measured with prefill {row.prefill}")
            if (row.id, row.prefill) in seen:
                raise ValueError(f"row {row.id} with prefill {row.prefill} stands twice")
            seen.add((row.id, row.prefill))
        return self

    def _all_metrics(self) -> Iterator[tuple[str, Metrics]]:
        yield from ((f"unquantized, prefill {mode}", metrics) for mode, metrics in self.unquantized.items())
        yield from ((f"row {row.id}", row.metrics) for row in self.rows)

    @property
    def prefills(self) -> list[Prefill]:
        """The prefill modes measured, coded first."""
        return [mode for mode in ("coded", "exact") if mode in self.unquantized]

    def row(self, id: str, prefill: Prefill) -> Row | None:
        """The row of an id and prefill mode, if it was measured."""
        return next((row for row in self.rows if row.id == id and row.prefill == prefill), None)


def save_comparison(path: Path, comparison: Comparison) -> None:
    """Write JSON, whole or not at all.

    Raises:
        GsrqError: a metric that is NaN or infinite, with its place.
    """
    require_finite(comparison.model_dump(), "comparison")  # JSON mode would make them null
    text = json.dumps(comparison.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def load_comparison(path: Path) -> Comparison:
    """Read what ``save_comparison`` wrote.

    Raises:
        GsrqError: not there, too large, truncated, not a comparison, of another schema, or with a field wrong.
    """
    mend = "run `gsrq compare` again with another --out"
    return read_document(path, Comparison, "comparison", KIND, SCHEMA, MAX_BYTES, mend)

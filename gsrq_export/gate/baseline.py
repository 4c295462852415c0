"""The baseline file: what the unquantized model and the accepted artifact measured, unit by unit. Schema 1.0.

Everything that must be equal for a comparison to be one is in it: text, model, settings, and a hash of the tokens
of every window and case. Floats are written so that they read back bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsrq_export.errors import GsrqError
from gsrq_export.json_document import read_document
from gsrq_export.stages.storage import write_atomic

SCHEMA = "1.0"
KIND: Final = "gsrq regression baseline"
MAX_BYTES = 64 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Gates(_Entry):
    """The limits. Those of perplexity are relative: 0.05 allows 1.05 times the perplexity.

    Attributes:
        confidence: of every one-sided bound and test but those of implausible gains.
        max_perplexity_increase: of the artifact over the unquantized model.
        max_recall_loss: of the unquantized model's recall, in absolute terms, at each length.
        perplexity_tolerance: increase over the accepted artifact that is no worsening: kernels of another
            machine differ in the last bits, and a tiny difference is soon significant.
        max_memory_increase: of one sequence's cache over the accepted artifact's, relative.
        max_perplexity_gain: a perplexity lower than the unquantized model's by more than this is not believed.
        anomaly_confidence: of the tests for gains over the unquantized model.
    """

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    max_perplexity_increase: Annotated[float, Field(gt=0, lt=100)] = 0.05
    max_recall_loss: Annotated[float, Field(gt=0, lt=1)] = 0.05
    perplexity_tolerance: Annotated[float, Field(ge=0, lt=100)] = 0.002
    max_memory_increase: Annotated[float, Field(ge=0, lt=100)] = 0.0
    max_perplexity_gain: Annotated[float, Field(gt=0, lt=1)] = 0.005
    anomaly_confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.999

    def override(self, changes: Mapping[str, float | None]) -> Gates:
        """With some limits replaced; None leaves one as it is.

        Raises:
            GsrqError: a limit out of range.
        """
        given = {name: float(value) for name, value in changes.items() if value is not None}
        try:
            return Gates.model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name, value = first["loc"][0], first["input"]
            raise GsrqError(f"gates.{name}: {value} is out of range", _sentence(first["msg"])) from None


class Settings(_Entry):
    """What is measured; see evaluate.suite.EvaluationSettings. prefill: the cache rule's, which both runs share."""

    window_tokens: Positive
    windows: Positive
    prompt_tokens: Positive
    recall_lengths: list[Positive]
    recall_cases: Positive
    batch: Positive
    seed: Annotated[int, Field(ge=0)]
    prefill: Literal["coded", "exact"]


class Hits(_Entry):
    """Recall at one length: a digit a case, 1 where the answer was right."""

    tokens: Positive
    hits: Annotated[str, Field(pattern=r"^[01]+$")]


class Run(_Entry):
    """Measured figures. window_nll: the mean of each window, nats a token."""

    window_nll: Annotated[list[Finite], Field(min_length=1)]
    recall: list[Hits]


class Accepted(Run):
    """The artifact that later ones are held against.

    Attributes:
        backend: what ran it in ONNX Runtime.
        cache_tokens, cache_bytes: one sequence's cache at the most tokens measured.
    """

    name: str
    codebooks_sha256: Sha256
    graph_sha256: Sha256
    backend: str
    cache_tokens: Positive
    cache_bytes: Positive


class Baseline(_Entry):
    """Attributes: units_sha256: of the tokens of all windows and cases; environment: versions it was recorded with."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    kind: Literal["gsrq regression baseline"]
    schema_version: Annotated[str, Field(alias="schema")]
    created_by: str
    environment: dict[str, str]
    model_id: str
    weights_sha256: Sha256
    text_sha256: Sha256
    units_sha256: Sha256
    settings: Settings
    gates: Gates
    exact: Run
    accepted: Accepted

    @model_validator(mode="after")
    def _complete(self) -> Baseline:
        lengths = self.settings.recall_lengths
        for name, run in (("exact", self.exact), ("accepted", self.accepted)):
            if len(run.window_nll) != self.settings.windows:
                raise ValueError(f"{name} has {len(run.window_nll)} windows, settings say {self.settings.windows}")
            if [row.tokens for row in run.recall] != lengths:
                raise ValueError(f"{name} has recall at {[row.tokens for row in run.recall]}, settings say {lengths}")
            for row in run.recall:
                if len(row.hits) != self.settings.recall_cases:
                    raise ValueError(
                        f"{name} has {len(row.hits)} cases at {row.tokens} tokens, settings say "
                        f"{self.settings.recall_cases}"
                    )
        return self


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(baseline.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def load_baseline(path: Path) -> Baseline:
    """Read what ``save_baseline`` wrote.

    Raises:
        GsrqError: not there, too large, truncated, not a baseline, of another schema, or with a figure missing or
            not finite.
    """
    mend = "record it again with `gsrq regress record`"
    return read_document(path, Baseline, "baseline", KIND, SCHEMA, MAX_BYTES, mend)


def _sentence(message: str) -> str:
    return message.removeprefix("Input ").replace("should", "it should", 1)

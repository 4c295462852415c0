"""metrics.json: what a build measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gsrq_export.errors import ArtifactError
from gsrq_export.evaluate.suite import Comparison, Evaluation, require_finite

SCHEMA = 1


@dataclass(frozen=True)
class Distortion:
    """How well one codebook codes held-out vectors.

    Attributes:
        layer: the layer's index in the model.
        kind: what is coded.
        relative_mse_by_stage: squared error over the vectors' energy after 1, 2, ... R stages.
        usage_by_stage: fraction of each stage's codewords that were used.
    """

    layer: int
    kind: Literal["key", "value"]
    relative_mse_by_stage: list[float]
    usage_by_stage: list[float]


@dataclass(frozen=True)
class CacheSize:
    """Bytes at one context length, one sequence, all layers.

    Attributes:
        context_tokens: tokens in the cache.
        code_bytes, exact_bytes: of the sequence: codes; sinks and window.
        codebook_bytes: shared by all sequences, as stored.
        plain_bytes: the same tokens in a 16-bit cache.
        effective_bits: 16 * (codes + exact + codebooks) / plain, bits an element.
    """

    context_tokens: int
    code_bytes: int
    exact_bytes: int
    codebook_bytes: int
    plain_bytes: int
    effective_bits: float


@dataclass(frozen=True)
class BuildMetrics:
    """Everything that a report shows but its provenance.

    Attributes:
        name: of the build.
        nominal_bits: codes alone, keys and values together, bits an element.
        key_bits, value_bits: the same of each.
        sizes: by rising context length.
        distortion: an entry a codebook.
        exact, coded, comparison: None where the build was not asked to evaluate.
    """

    name: str
    nominal_bits: float
    key_bits: float
    value_bits: float
    sizes: list[CacheSize]
    distortion: list[Distortion]
    exact: Evaluation | None = None
    coded: Evaluation | None = None
    comparison: Comparison | None = None
    schema: int = field(default=SCHEMA)

    def save(self, path: Path) -> None:
        """Write JSON; refuses NaN and infinity with a GsrqError that names the place."""
        data = asdict(self)
        require_finite(data, "metrics")
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> BuildMetrics:
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: missing, damaged or of another schema.
        """
        try:
            data: Any = json.loads(path.read_text("utf-8"))
            if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA}")
            fields = dict(data)
            fields["sizes"] = [CacheSize(**size) for size in data["sizes"]]
            fields["distortion"] = [Distortion(**entry) for entry in data["distortion"]]
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: {error}", "build the artifact again") from error

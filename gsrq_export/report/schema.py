"""metrics.json: what a build measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gsrq_export.codec.profile import Profile
from gsrq_export.errors import ArtifactError
from gsrq_export.evaluate.suite import Comparison, Evaluation, require_finite

SCHEMA = 1

Kind = Literal["key", "value"]


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
    kind: Kind
    relative_mse_by_stage: list[float]
    usage_by_stage: list[float]


@dataclass(frozen=True)
class LayerProfile:
    """How the codebook of a layer's keys or values, as it is in the artifact, codes held-out vectors."""

    layer: int
    kind: Kind
    profile: Profile


@dataclass(frozen=True)
class RecallPoint:
    """Recall at one context length with its 95 % interval."""

    tokens: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class RatePoint:
    """One row of a comparison of cache codecs: what it takes and what it loses.

    Attributes:
        label: as shown.
        ours: whether it is this project's codec; those are joined by a line.
        nominal_bits: all that a coded token stores, bits an element.
        effective_bits: everything counted, bits an element: of one sequence, by its tokens ("8192"), or of so many
            that share the codebooks ("8192x64").
        prefill: "coded" or "exact": what the tokens of a prompt see of each other.
        perplexity_ratio: coded / exact, by name of the text.
        recall: by rising context length.
        kl: divergence of the coded model's next-token distribution from the exact one's, nats a token.
        tasks: mean score by name, 0 .. 1.
    """

    label: str
    ours: bool
    nominal_bits: float
    effective_bits: dict[str, float]
    prefill: Literal["coded", "exact"]
    perplexity_ratio: dict[str, float]
    recall: list[RecallPoint]
    kl: float | None = None
    tasks: dict[str, float] | None = None


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
        profile: an entry a codebook of the artifact; supersedes ``distortion``, which is of training.
        rates: a comparison with other codecs; empty where none was run.
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
    profile: list[LayerProfile] = field(default_factory=list)
    rates: list[RatePoint] = field(default_factory=list)
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
            fields["profile"] = [
                LayerProfile(**{**entry, "profile": Profile.from_dict(entry["profile"])})
                for entry in data.get("profile", [])
            ]
            fields["rates"] = [
                RatePoint(**{**point, "recall": [RecallPoint(**row) for row in point["recall"]]})
                for point in data.get("rates", [])
            ]
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: {error}", "build the artifact again") from error

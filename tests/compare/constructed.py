"""Comparisons with made-up figures, whose right verdict can be worked out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gsrq_export.compare.schema import SERVING, Calibration, Comparison, Model, Protocol, Row, Rule, Seconds, Text

HASH = "0" * 64


def evaluation(nll: Sequence[float], hits: Sequence[bool] = (), tokens: int = 512) -> dict[str, Any]:
    """The fields of an Evaluation that a comparison reads."""
    recall = None
    if hits:
        row = {"tokens": tokens, "hits": list(hits), "rate": sum(hits) / len(hits), "cases": len(hits)}
        recall = {"facts": 4, "lengths": [row]}
    mean = sum(nll) / len(nll)
    return {
        "perplexity": {"perplexity": math.exp(mean), "nll": mean, "window_nll": list(nll)},
        "recall": recall,
        "seed": 0,
    }


def row(id: str, bits: float, metrics: dict[str, Any], ours: bool = False, prefill: str = "coded") -> Row:
    return Row(
        id=id,
        label=id.upper(),
        ours=ours,
        setting={"method": id},
        nominal_bits=bits,
        effective_bits={point.key: bits for point in SERVING},
        prefill=prefill,
        seconds=Seconds(fit=1.0, evaluate=2.0),
        metrics={"novels": metrics},
    )


def protocol(**changes: Any) -> Protocol:
    fields = {
        "model": Model(id="m", weights_sha256=HASH),
        "rule": Rule(sinks=4, window=64, block=64),
        "calibration": Calibration(sequences=2, sequence_length=16, sha256=HASH),
        "texts": [Text(name="novels", sha256=HASH, settings={"windows": 2})],
        "serving": list(SERVING),
    }
    return Protocol(**{**fields, **changes})


def comparison(rows: Sequence[Row], exact: dict[str, Any]) -> Comparison:
    modes = {row.prefill for row in rows} or {"coded"}
    return Comparison(
        created_by="test",
        environment={"device": "cpu"},
        protocol=protocol(),
        unquantized={mode: {"novels": exact} for mode in modes},
        rows=list(rows),
    )

"""A comparison of the demo model on the project's own documents, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import random_codebook
from demo import demo
from families import ROOT

from gsrq_export.capture import Captured, CaptureSettings, capture
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.compare.schema import Model, Rule
from gsrq_export.compare.subject import EvaluationText, Subject, perplexity_only
from gsrq_export.evaluate.suite import EvaluationSettings
from gsrq_export.model.introspect import ModelSpec, inspect_model

LENGTH = 320
SETTINGS = EvaluationSettings(window_tokens=96, windows=2, recall_lengths=(160,), recall_cases=2)


class Counted:
    """Captures into a directory and counts how often it was asked, at which width."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.widths = directory, []

    def of(self, ids: Any, spec: ModelSpec) -> Any:
        def captured(width: int | None) -> Captured:
            self.widths.append(width)
            settings = CaptureSettings(width or 1, width or 1, gradients=width is not None)
            capture(demo()[0].requires_grad_(False), spec, ids, settings, self.directory)
            return Captured(self.directory)

        return captured


def subject(directory: Path, window: int = 8) -> tuple[Subject, Counted]:
    model, tokenizer = demo()
    spec = inspect_model(model, 512)
    ids = tokenizer.encode((ROOT / "docs/method.md").read_text(), add_special_tokens=False, verbose=False)
    calibration = np.array(ids[: 2 * LENGTH], np.int64).reshape(2, LENGTH)
    texts = [
        EvaluationText("operator", (ROOT / "docs/operator.md").read_text(), SETTINGS),
        EvaluationText("readme", (ROOT / "README.md").read_text(), perplexity_only(SETTINGS)),
    ]
    counted = Counted(directory)
    made = Subject(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        identity=Model(id="demo-6m", weights_sha256="0" * 64),
        rule=Rule(sinks=2, window=window, block=32),
        ids=calibration,
        texts=texts,
        capture=counted.of(calibration, spec),
    )
    return made, counted


def codebooks(layers: int, stages: int = 4) -> list[LayerCodebooks]:
    """Random ones, small beside the vectors, so that the model still works a little."""

    def small(seed: int, transform: bool) -> Codebook:
        book = random_codebook(128, 64, stages, seed, transform)
        return Codebook((book.codewords.float() / 2).to(torch.float16), book.transform)

    return [LayerCodebooks(small(i, True), small(i + 50, False)) for i in range(layers)]

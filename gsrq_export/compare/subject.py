"""What a comparison is made on: the model, the cache rule, the texts, and whose codebooks are ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from gsrq_export.baselines.base import LayerCodecs
from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.cache.torch_cache import CodedAttention
from gsrq_export.capture import Captured
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.int8 import snap_layers
from gsrq_export.codec.storage import book_tensors
from gsrq_export.compare.schema import SERVING, Calibration, Model, Prefill, Protocol, Rule, Text
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.suite import EvaluationSettings, given_tokens
from gsrq_export.model.introspect import ModelSpec

LONG = 10_000  # characters; a text of more is an evaluation text, not a question


@dataclass(frozen=True)
class EvaluationText:
    """Held-out text under a name of letters, and what is measured on it."""

    name: str
    content: str
    settings: EvaluationSettings

    def of(self, prefill: Prefill) -> EvaluationSettings:
        """The settings under a prefill mode, which decides how much of a window is given."""
        given = given_tokens(self.settings.window_tokens, prefill == "exact")
        return replace(self.settings, prompt_tokens=given)

    def entry(self) -> Text:
        settings = json.loads(json.dumps(asdict(self.settings)))
        del settings["prompt_tokens"]
        return Text(name=self.name, sha256=hashlib.sha256(self.content.encode()).hexdigest(), settings=settings)


def perplexity_only(settings: EvaluationSettings) -> EvaluationSettings:
    """For all texts but the first."""
    return EvaluationSettings(
        window_tokens=settings.window_tokens,
        windows=settings.windows,
        recall_lengths=(),
        batch=settings.batch,
        seed=settings.seed,
    )


class Tokenizer:
    """A tokenizer that remembers the tokens of long texts: every row is evaluated on the same ones."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._seen: dict[tuple[object, ...], list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: Any, **options: Any) -> list[int]:
        if not isinstance(text, str) or len(text) < LONG:
            return self._tokenizer.encode(text, **options)  # type: ignore[no-any-return]
        key = (text, *sorted(options.items()))
        if key not in self._seen:
            self._seen[key] = self._tokenizer.encode(text, **options)
        return list(self._seen[key])


@dataclass(frozen=True)
class Subject:
    """Attributes:
    model, tokenizer, spec: loaded, on the device that everything runs on.
    identity: of the model, for the file.
    rule: of every row.
    ids: calibration tokens, int64 [sequences, length].
    texts: at least one.
    capture: gives the vectors of ``ids``, with gradient norms at a width, or none; called when a row must be fitted.
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    identity: Model
    rule: Rule
    ids: np.ndarray[Any, np.dtype[np.int64]]
    texts: Sequence[EvaluationText]
    capture: Callable[[int | None], Captured]

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def protocol(self) -> Protocol:
        digest = hashlib.sha256(np.ascontiguousarray(self.ids, "<i8").tobytes()).hexdigest()
        count, length = self.ids.shape
        return Protocol(
            model=self.identity,
            rule=self.rule,
            calibration=Calibration(sequences=count, sequence_length=length, sha256=digest),
            texts=[text.entry() for text in self.texts],
            serving=list(SERVING),
        )


@dataclass(frozen=True)
class Ours:
    """A row of our own: codebooks that are there already.

    Attributes:
        id: of the row; ``registry`` has none that begins with "ours".
        layers: the codebooks of each layer that owns a cache.
        beam: of encoding.
    """

    id: str
    label: str
    layers: Sequence[LayerCodebooks]
    beam: int = 1

    def setting(self) -> dict[str, Any]:
        """What identifies it: a hash of all codewords and transforms, and the shapes, alike layers once."""
        digest = hashlib.sha256()
        for book in (book for layer in self.layers for book in (layer.keys, layer.values)):
            for tensor in book_tensors(book).values():
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        sides = {"keys": [layer.keys for layer in self.layers], "values": [layer.values for layer in self.layers]}
        shapes = {kind: _shapes(books) for kind, books in sides.items()}
        return {"quantizer": "ours", "codebooks_sha256": digest.hexdigest(), "beam": self.beam, **shapes}

    def check(self, subject: Subject) -> None:
        """Raises GsrqError where the codebooks are not of this model."""
        try:
            CodedAttention(subject.spec, self.layers, subject.rule.cache_rule)  # checks number and widths
        except GsrqError as error:
            raise GsrqError(f"{self.label}: {error.problem}", error.mend) from None

    def codecs(self, device: torch.device) -> list[LayerCodecs]:
        return [
            LayerCodecs(*(ResidualCodec(book.to(device), self.beam) for book in (layer.keys, layer.values)))
            for layer in self.layers
        ]

    def snapped(self) -> Ours:
        """The row with int8 codewords, see codec/int8.py."""
        return Ours(f"{self.id}-int8", f"{self.label}, int8 codewords", snap_layers(self.layers), self.beam)

    def prefix(self, share: float) -> Ours:
        """A cheaper row: of every codebook the first ``share`` of its stages, rounded, at least one.

        Raises:
            GsrqError: share outside 0 .. 1, its ends left out.
        """
        if not 0 < share < 1:
            raise GsrqError(f"prefix {share:g} is not a share of the stages", "give numbers between 0 and 1")

        def cut(book: Codebook) -> Codebook:
            return book.first_stages(max(1, round(share * book.stages)))

        layers = [LayerCodebooks(cut(layer.keys), cut(layer.values)) for layer in self.layers]
        return Ours(f"{self.id}-p{share:g}", f"{self.label}, first {share:g} of the stages", layers, self.beam)


def _shapes(books: Sequence[Codebook]) -> list[list[int]]:
    """[width, stages] of each layer; one entry where all are alike."""
    shapes = [[book.width, book.stages] for book in books]
    return shapes[:1] if all(shape == shapes[0] for shape in shapes) else shapes

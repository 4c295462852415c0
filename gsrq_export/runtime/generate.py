"""Streaming text generation from an artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.runtime.detokenize import Detokenizer
from gsrq_export.runtime.session import OrtModel

Stop = Literal["eos", "max_new_tokens", "max_length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token, and the rest is not used.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the fewest tokens whose probabilities reach p together (nucleus sampling).
        seed: equal seeds give equal text on one machine.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GsrqError(f"temperature: {self.temperature} is not a number >= 0", "use 0 for greedy, or 0.7 say")
        if self.top_k < 0:
            raise GsrqError(f"top_k: {self.top_k} is below 0", "use 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise GsrqError(f"top_p: {self.top_p} is not in (0, 1]", "use 1 for all tokens")
        if self.seed < 0:
            raise GsrqError(f"seed: {self.seed} is below 0", "use 0 or more")

    def choose(self, logits: npt.NDArray[np.float32], rng: np.random.Generator) -> int:
        """A token id from logits [vocab]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scores, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        share = weights / weights.sum()
        # A token stays while those before it fall short of p, so that there is always one.
        keep = int((np.cumsum(share) - share < self.top_p).sum())
        return int(rng.choice(order[:keep], p=share[:keep] / share[:keep].sum()))


def load_tokenizer(artifact_dir: Path) -> Any:
    """The tokenizer that the artifact carries.

    Raises:
        ArtifactError: it is missing or cannot be read.
    """
    path = artifact_dir / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        raise ArtifactError(f"{path / 'tokenizer.json'} does not exist", "build the artifact again")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ArtifactError(f"{path}: {str(error).splitlines()[0]}", "build the artifact again") from error


def load_eos(artifact_dir: Path) -> frozenset[int]:
    """Token ids that end a text: of generation_config.json, else of config.json; may be none."""
    for name in ("generation_config.json", "config.json"):
        path = artifact_dir / "tokenizer" / name
        if not path.is_file():
            continue
        try:
            ids = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a JSON object: {error}", "build the artifact again") from error
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


class Generation(Iterator[str]):
    """The new text, piece by piece, while the model runs.

    Args:
        model: its caches are reset by the first piece; one generation at a time.
        tokenizer: of ``load_tokenizer``.
        prompt: text, or token ids (of a chat template, for instance).
        eos: ids that end the text; see ``load_eos``.
    Raises:
        GsrqError: an empty or too long prompt or a token out of range, at once and not at the first piece.

    Attributes:
        prompt_tokens: ids given to the model.
        new_tokens: ids made so far, without the eos.
        stop: why it ended; None while it runs.
    """

    def __init__(
        self,
        model: OrtModel,
        tokenizer: Any,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        if max_new_tokens < 1:
            raise GsrqError(f"max_new_tokens: {max_new_tokens} is below 1", "use 1 or more")
        ids = tokenizer.encode(prompt, verbose=False) if isinstance(prompt, str) else prompt
        self.prompt_tokens: list[int] = list(ids)
        if not self.prompt_tokens:
            raise GsrqError("the prompt is empty", "give some text")
        model.check([self.prompt_tokens])
        self.new_tokens: list[int] = []
        self.stop: Stop | None = None
        self._sampling = sampling or Sampling()
        self._pieces = self._run(model, Detokenizer(tokenizer, self.prompt_tokens), max_new_tokens, eos)

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, model: OrtModel, text: Detokenizer, most: int, eos: frozenset[int]) -> Iterator[str]:
        rng = np.random.default_rng(self._sampling.seed)
        logits = model.prefill([self.prompt_tokens])
        while self.stop is None:
            token = self._sampling.choose(logits[0], rng)
            if token in eos:
                self.stop = "eos"
                break
            self.new_tokens.append(token)
            if piece := text.add(token):
                yield piece
            if len(self.new_tokens) == most:
                self.stop = "max_new_tokens"
            elif len(self.prompt_tokens) + len(self.new_tokens) > model.max_length:
                self.stop = "max_length"
            else:
                logits = model.step([token])
        if piece := text.finish():
            yield piece

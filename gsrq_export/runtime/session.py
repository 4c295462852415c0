"""Runs an artifact's model.onnx with ONNX Runtime, keeping the coded cache between calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from gsrq_export import native
from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.runtime.cache import CacheBuffers
from gsrq_export.runtime.metadata import PARTS, CacheMetadata

PREFILL_CHUNK = 512  # tokens a row in one call of a coded prefill; changes memory, not results

CUDA = "CUDAExecutionProvider"
Backend = Literal["cpu-op", "cuda-op", "onnx-function"]


class OrtModel:
    """An exported model and the caches of one batch of sequences.

    With the custom-op library the caches are updated in place: each is bound as input and output. Without
    it the graph's own function of standard operators runs, and two sets of caches take turns.

    Args:
        artifact_dir: holds model.onnx.
        threads: of one operator; None leaves it to ONNX Runtime.
        library: the custom-op library; "auto" takes the one that ``gsrq plugins build`` made, if any; None
            runs without.
        provider: an execution provider of the installed ONNX Runtime. With CUDAExecutionProvider the caches lie on
            the GPU and the library is the one with the op for CUDA.
    Raises:
        ArtifactError: no model.onnx, or not one that this program can run.
        GsrqError: the library or the provider is not there.

    Attributes:
        backend: "cpu-op" or "cuda-op" (the library), else "onnx-function".
    """

    def __init__(
        self,
        artifact_dir: Path,
        threads: int | None = None,
        library: Path | Literal["auto"] | None = "auto",
        provider: str = "CPUExecutionProvider",
    ) -> None:
        path = artifact_dir / "model.onnx"
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist", "name the directory that a build wrote")
        if provider not in ort.get_available_providers():
            raise GsrqError(
                f"provider {provider!r} is not in this ONNX Runtime",
                "install onnxruntime-gpu in place of onnxruntime"
                if provider == CUDA
                else f"use one of {', '.join(ort.get_available_providers())}",
            )
        options = ort.SessionOptions()
        # Shapes change from call to call, and a plan of memory would be kept for each that was ever seen.
        options.enable_mem_pattern = False
        if threads is not None:
            if threads < 1:
                raise GsrqError(f"threads: {threads} is below 1", "use 1 or more")
            options.intra_op_num_threads = threads
        on_cuda = provider == CUDA
        found = native.find(native.ORT_CUDA if on_cuda else native.ORT) if library == "auto" else library
        self.backend: Backend = "onnx-function" if found is None else "cuda-op" if on_cuda else "cpu-op"
        if found is not None:
            if not Path(found).is_file():
                raise GsrqError(f"library {found} does not exist", "build it with `gsrq plugins build`")
            try:
                options.register_custom_ops_library(str(found))
            except Exception as error:  # ONNX Runtime has no public base class of its errors
                raise GsrqError(f"library {found}: {_line(error)}", "build it again for this machine") from error
        settings: dict[str, str] = {}
        if on_cuda:
            ort.preload_dlls()  # the CUDA libraries that pip packages brought
            settings = {"use_tf32": "0"}  # float32 products as on the CPU; decoding is bound by memory either way
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:
            raise ArtifactError(f"{path}: {_line(error)}", "check the artifact with `gsrq verify`") from error
        if provider not in self._session.get_providers():  # ONNX Runtime falls back to the CPU with a warning
            raise GsrqError(
                f"provider {provider!r} does not start on this machine; ONNX Runtime's log has the reason",
                "install the CUDA and cuDNN libraries that this onnxruntime-gpu needs: pip install "
                "'onnxruntime-gpu[cuda,cudnn]'",
            )
        self.metadata = CacheMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map)
        self.vocab_size = _check_signature(self._session, self.metadata)
        self._device = "cuda" if on_cuda else "cpu"
        self._caches: CacheBuffers | None = None
        self._lengths = np.zeros(0, np.int64)

    @property
    def max_length(self) -> int:
        """The most tokens a sequence may have."""
        return self.metadata.max_length

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession, for a caller that keeps caches of its own."""
        return self._session

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each row's cache: int64 [B]."""
        return self._lengths.copy()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache tensors now allocated, spare capacity and second sets included."""
        return 0 if self._caches is None else self._caches.nbytes

    def read_cache(self, layer: int, part: str) -> npt.NDArray[Any]:
        """A copy of past.{layer}.{part}, with whatever lies beyond the lengths."""
        if self._caches is None:
            raise GsrqError("there is no cache", "prefill first")
        return self._caches.read(f"{layer}.{part}")

    def reset(self, batch: int = 0) -> None:
        """Drop the caches; ``batch`` rows of length 0 follow."""
        self._caches = None
        self._lengths = np.zeros(batch, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> npt.NDArray[np.float32]:
        """Start a batch anew with one prompt a row, of any lengths.

        Args:
            prompts: token ids; none empty.
            chunk: tokens a row in one call. None: PREFILL_CHUNK with coded prefill, where chunks change
                nothing; all at once with exact prefill, where tokens of earlier calls are seen coded.
        Returns:
            logits of each row's last token, float32 [B, vocab].
        Raises:
            GsrqError: a bad token or a prompt that is empty or too long; the caches are as before.
        """
        if chunk is not None and chunk < 1:
            raise GsrqError(f"chunk: {chunk} is below 1", "use 1 or more")
        self.check(prompts)
        self.reset(len(prompts))
        longest = max(len(prompt) for prompt in prompts)
        if chunk is None:
            chunk = longest if self.metadata.exact_prefill else PREFILL_CHUNK
        last = np.zeros((len(prompts), self.vocab_size), np.float32)
        for start in range(0, longest, chunk):
            part = [prompt[start : start + chunk] for prompt in prompts]
            index = np.array([[max(0, len(row) - 1)] for row in part])
            logits = self._run(part, index)
            rows = [b for b, row in enumerate(part) if row]
            last[rows] = logits[rows, 0]
        return last

    def step(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append one token to every row; returns logits float32 [B, vocab].

        Raises:
            GsrqError: a bad token, or a row that is full; nothing has changed.
        """
        return self.append([[token] for token in tokens])[:, 0]

    def append(self, tokens: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Append tokens to the rows in one call; a row may get none.

        Returns:
            logits after each new token, float32 [B, T, vocab] for T the most tokens of a row; rows with
            fewer end in padding without meaning.
        Raises:
            GsrqError: as step.
        """
        self._check(tokens, self._lengths, least=0)
        steps = max(len(row) for row in tokens)
        if steps == 0:
            raise GsrqError("append: no row has a token", "give at least one")
        return self._run(tokens, np.tile(np.arange(steps), (len(tokens), 1)))

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise the GsrqError that ``prefill`` would, without running."""
        self._check(prompts, np.zeros(len(prompts), np.int64), least=1)

    def _check(self, tokens: Sequence[Sequence[int]], past: npt.NDArray[np.int64], least: int) -> None:
        if len(tokens) != len(past) or not len(past):
            raise GsrqError(f"{len(tokens)} rows of tokens for a batch of {len(past)}", "prefill the batch first")
        for b, row in enumerate(tokens):
            if len(row) < least:
                raise GsrqError(f"row {b} has no tokens", "give each row at least one")
            total = int(past[b]) + len(row)
            if total > self.max_length:
                raise GsrqError(
                    f"row {b}: {total} tokens exceed the artifact's max_length of {self.max_length}",
                    "shorten the prompt, or build with a larger max_length",
                )
            bad = next((t for t in row if not 0 <= t < self.vocab_size), None)
            if bad is not None:
                raise GsrqError(
                    f"row {b}: token {bad} is outside the vocabulary 0 .. {self.vocab_size - 1}",
                    "use the artifact's own tokenizer",
                )

    def _run(self, tokens: Sequence[Sequence[int]], index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """One call of the graph. index: logit_indices [B, outputs]."""
        new = np.array([len(row) for row in tokens], np.int64)
        ids = np.zeros((len(tokens), int(new.max())), np.int64)
        for b, row in enumerate(tokens):
            ids[b, : len(row)] = row
        need = int(self.metadata.rule.coded(int((self._lengths + new).max())))
        if self._caches is None:
            self._caches = CacheBuffers(self.metadata, len(tokens), self.backend != "onnx-function", self._device)
        self._caches.reserve(need)
        binding = self._session.io_binding()
        for name, array in (
            ("input_ids", ids),
            ("past_lengths", self._lengths),
            ("new_lengths", new),
            ("logit_indices", index.astype(np.int64)),
        ):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")  # the first bound, so the first that get_outputs gives
        self._caches.bind(binding)
        self._session.run_with_iobinding(binding)
        self._caches.advance()
        self._lengths = self._lengths + new
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return logits


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_signature(session: Any, metadata: CacheMetadata) -> int:
    """Hold the graph's inputs and outputs against the metadata; returns the vocabulary's size."""
    tensors = [f"{i}.{part}" for i in range(len(metadata.layers)) for part in PARTS]
    inputs = {"input_ids", "past_lengths", "new_lengths", "logit_indices"} | {f"past.{t}" for t in tensors}
    outputs = {"logits"} | {f"present.{t}" for t in tensors}
    for kind, have, want in (
        ("inputs", {i.name for i in session.get_inputs()}, inputs),
        ("outputs", {o.name for o in session.get_outputs()}, outputs),
    ):
        if have != want:
            odd = sorted(have ^ want)
            raise ArtifactError(
                f"model.onnx: its {kind} are not those of its metadata: {', '.join(odd[:4])}",
                "build the artifact again",
            )
    vocab = next(o.shape[-1] for o in session.get_outputs() if o.name == "logits")
    if not isinstance(vocab, int):
        raise ArtifactError("model.onnx: the logits' last dimension is not a number", "build the artifact again")
    return vocab

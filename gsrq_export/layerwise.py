"""Capture of a model whose weights are streamed: each layer is read once for many sequences, not once for each shard.

Forward, the input of every layer goes to a file. Backward, from the last layer to the first, a layer is read again, run
again on its input with gradients, and hands the gradient at its input to the layer before: what autograd does with the
whole model at once, in the same order, so the shards hold the same bits. In memory are one layer, the hidden states of
one shard, and what autograd keeps of the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from gsrq_export.capture import CaptureSettings, Recorder, Shard, layer_tensors, shard_entries
from gsrq_export.model.intercept import intercept
from gsrq_export.model.introspect import ModelSpec
from gsrq_export.model.layers import CutModel, LayerCall
from gsrq_export.model.streaming import StreamedWeights, streamed_weights
from gsrq_export.stages.storage import TEMPORARY, write_atomic

LOGIT_BYTES = 256 << 20  # of float32 logits at a time; the loss takes a few times as much
_SAFETENSORS = {torch.float16: "F16", torch.int32: "I32", torch.float32: "F32"}  # in the order in which it sorts types


def capture_layerwise(
    model: torch.nn.Module,
    spec: ModelSpec,
    shards: Sequence[Shard],
    settings: CaptureSettings,
    progress: Callable[[int], None],
) -> None:
    """Write the shards' files, as many shards at a time as ``settings.scratch_bytes`` of their hidden states hold.

    Args:
        model: one of ``load_streamed``.
    """
    weights = streamed_weights(model)
    assert weights is not None
    cut = CutModel(model)
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    for wave in _waves(shards, 4 * width * (len(cut.layers) + 1), settings.scratch_bytes):
        _Wave(cut, weights, spec, settings, wave, width).capture(progress)


def _waves(shards: Sequence[Shard], token_bytes: int, budget: int) -> Iterator[Sequence[Shard]]:
    """Shards in turn, so many together as the budget holds, at least one."""
    wave: list[Shard] = []
    for shard in shards:
        if wave and token_bytes * sum(s.ids.size for s in [*wave, shard]) > budget:
            yield wave
            wave = []
        wave.append(shard)
    if wave:
        yield wave


@dataclass
class _Wave:
    """Shards that go through the layers together."""

    cut: CutModel
    weights: StreamedWeights
    spec: ModelSpec
    settings: CaptureSettings
    shards: Sequence[Shard]
    width: int

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.spec)

    def capture(self, progress: Callable[[int], None]) -> None:
        first, gradients = self.shards[0].target, self.settings.gradients
        scratch = first.with_name(f"{TEMPORARY}hidden-{first.stem}")  # its own, as other processes may capture here too
        self.ids = [torch.from_numpy(shard.ids).to(self.weights.device) for shard in self.shards]
        with (
            _States(scratch, self.ids, self.width, len(self.cut.layers) + 1) as self.states,
            _shard_files(self.shards, self.spec, self.settings) as self.files,
            intercept(self.cut.model, self.recorder),
            torch.set_grad_enabled(gradients),
        ):
            calls = self._forward()
            if gradients:
                self._loss()
                self._backward(calls)
            for file, shard in zip(self.files, self.shards, strict=True):
                file.close()
                write_atomic(shard.target, file.path.replace)
                progress(len(shard.ids))

    def _forward(self) -> list[list[LayerCall]]:
        calls = []
        for s, ids in enumerate(self.ids):
            hidden, of_layers = self.cut.before(ids)
            self.states.put(0, s, hidden)
            calls.append(of_layers)
        for i, layer in enumerate(self.cut.layers):
            with self.weights.kept(layer):
                for s in range(len(self.shards)):
                    # With gradients here too, though none is taken: kernels are chosen by whether there are any.
                    hidden = self.states.get(i, s, self.weights.device).requires_grad_(self.settings.gradients)
                    self.states.put(i + 1, s, self.cut.run(i, hidden, calls[s][i]))
                    if not self.settings.gradients:
                        self._keep(s, [])
                    self.recorder.clear()
        return calls

    def _loss(self) -> None:
        """Puts the gradient of the loss at the last layer's output in that output's place."""
        last = len(self.cut.layers)
        head = self.cut.model.get_output_embeddings()  # type: ignore[operator]
        with self.weights.kept(head) if head is not None else nullcontext():
            for s, ids in enumerate(self.ids):
                hidden = self.states.get(last, s, self.weights.device)
                vocabulary = int(self.cut.model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
                size = max(1, LOGIT_BYTES // (4 * vocabulary * len(ids)))
                parts = [
                    _loss_gradient(self.cut, hidden[:, start : start + size], ids[:, start + 1 : start + size + 1])
                    for start in range(0, hidden.shape[1], size)
                ]
                self.states.put(last, s, torch.cat(parts, 1))

    def _backward(self, calls: list[list[LayerCall]]) -> None:
        for i in reversed(range(len(self.cut.layers))):
            with self.weights.kept(self.cut.layers[i]):
                for s in range(len(self.shards)):
                    hidden = self.states.get(i, s, self.weights.device).requires_grad_()
                    out = self.cut.run(i, hidden, calls[s][i])
                    indices = list(self.recorder.keys)
                    leaves = [self.recorder.keys[j] for j in indices] + [self.recorder.values[j] for j in indices]
                    at_output = self.states.get(i + 1, s, self.weights.device)
                    found = torch.autograd.grad(out, [*leaves, *([hidden] if i else [])], at_output)
                    if i:
                        self.states.put(i, s, found[-1])
                    self._keep(s, found[: len(leaves)])
                    self.recorder.clear()
                    del out, leaves, found

    def _keep(self, shard: int, gradients: Sequence[torch.Tensor]) -> None:
        """Write what the layer that just ran has shown."""
        indices, kept = list(self.recorder.keys), self.shards[shard].kept
        for n, j in enumerate(indices):
            pair = (gradients[n], gradients[n + len(indices)]) if gradients else None
            for name, tensor in layer_tensors(self.spec, j, self.recorder, pair, self.settings, kept).items():
                self.files[shard].put(name, tensor)


def _loss_gradient(cut: CutModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """hidden: [B, n, H], of which the first ``targets.shape[1]`` positions predict ``targets``; returns [B, n, H]."""
    hidden = hidden.clone().requires_grad_()
    if not targets.shape[1]:
        return torch.zeros_like(hidden)
    logits = cut.after(hidden).float()[:, : targets.shape[1]]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return torch.autograd.grad(loss, hidden)[0]


class _States:
    """Hidden states of every layer and shard in one file; a slot is a layer's input, later its gradient.

    Read and written, not mapped: mapped pages would count as the process's memory.
    """

    def __init__(self, path: Path, ids: Sequence[torch.Tensor], width: int, slots: int) -> None:
        self._path, self._shapes = path, [(*batch.shape, width) for batch in ids]
        sizes = [4 * batch.numel() * width for batch in ids]
        self._starts = [sum(sizes[:s]) for s in range(len(sizes))]
        self._slot, self._slots = sum(sizes), slots

    def __enter__(self) -> _States:
        self._file: BinaryIO = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def put(self, slot: int, shard: int, hidden: torch.Tensor) -> None:
        self._file.seek(slot * self._slot + self._starts[shard])
        self._file.write(hidden.detach().float().cpu().contiguous().numpy().data)

    def get(self, slot: int, shard: int, device: torch.device) -> torch.Tensor:
        out = torch.empty(self._shapes[shard])
        self._file.seek(slot * self._slot + self._starts[shard])
        read = self._file.readinto(out.numpy().data.cast("B"))  # type: ignore[attr-defined]
        assert read == 4 * out.numel()
        return out.to(device)


class _ShardFile:
    """A safetensors file of known tensors, filled in any order; its bytes are those that safetensors itself writes."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        self.path = path
        ranks = {dtype: rank for rank, dtype in enumerate(_SAFETENSORS)}
        header, end = {}, 0
        self._spans: dict[str, tuple[int, int]] = {}
        for name in sorted(entries, key=lambda name: (-ranks[entries[name][0]], name)):
            dtype, shape = entries[name]
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._spans[name] = start, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()
        self._file.truncate(self._data + end)
        self._left = set(entries)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        start, end = self._spans[name]
        self._file.seek(self._data + start)
        assert self._file.write(tensor.cpu().contiguous().numpy().data) == end - start
        self._left.remove(name)

    def close(self) -> None:
        """The file is complete."""
        assert not self._left, sorted(self._left)
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def _shard_files(shards: Sequence[Shard], spec: ModelSpec, settings: CaptureSettings) -> Iterator[list[_ShardFile]]:
    files: list[_ShardFile] = []
    try:
        for shard in shards:
            entries = shard_entries(spec, shard.rows, settings)
            files.append(_ShardFile(shard.target.with_name(f"{TEMPORARY}part-{shard.target.name}"), entries))
            files[-1].put("positions", shard.positions())
        yield files
    finally:
        for file in files:
            file.discard()

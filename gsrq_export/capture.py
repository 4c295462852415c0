"""Capture: the model's keys (before RoPE) and values on sample traffic, with the weight that its loss gives them.

Traffic runs in shards of a few sequences; each shard is a file, so an interrupted capture goes on where it was.
A model whose weights are streamed goes layer by layer (layerwise.py) and leaves the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gsrq_export.cache.frame import rotate, to_frame
from gsrq_export.codec.codebook import ENCODE_CHUNK
from gsrq_export.codec.metric import key_transform, value_transform
from gsrq_export.codec.residual import widened
from gsrq_export.errors import GsrqError
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import LayerSpec, ModelSpec
from gsrq_export.model.streaming import StreamedWeights, device_of, streamed_weights
from gsrq_export.reservoir import Rows, kept_tokens, rows_of
from gsrq_export.stages.storage import write_atomic

KINDS = ("key", "value")
SHARD_TOKENS = 4096  # tokens of a shard; bounds memory and what an interruption loses


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"shard-{number:05d}.safetensors"


def shard_batch(length: int) -> int:
    """Sequences of ``length`` tokens in a shard."""
    return max(1, SHARD_TOKENS // length)


@dataclass(frozen=True)
class CaptureSettings:
    """Gradient norms are taken of parts of key_width and value_width elements; those of any multiple follow.

    rotated_keys: parts of keys are those after RoPE, which mixes the elements of a head. Keys are stored before it.
    vectors: tokens whose keys and values are kept, a sample that ``seed`` draws (reservoir.py); None: all.
    scratch_bytes: of disk that a streamed model's hidden states may take; the result does not depend on it.
    """

    key_width: int
    value_width: int
    gradients: bool = True
    batch: int = 4  # sequences a shard
    rotated_keys: bool = False
    vectors: int | None = None
    seed: int = 0
    scratch_bytes: int = 32 << 30


@dataclass(frozen=True)
class Shard:
    """Sequences that are captured into one file.

    Attributes:
        ids: int64 [B, L].
        kept: rows of its B * L tokens that are stored; None: all.
    """

    target: Path
    ids: np.ndarray[Any, np.dtype[np.int64]]
    kept: Rows | None = None

    @property
    def rows(self) -> int:
        return int(self.ids.size if self.kept is None else len(self.kept))

    def positions(self) -> torch.Tensor:
        """int32 [rows]: the stored tokens' places in their sequences."""
        length = self.ids.shape[1]
        places = torch.arange(length, dtype=torch.int32).repeat(len(self.ids))
        return places if self.kept is None else places[torch.from_numpy(self.kept)]


def attend(call: AttentionCall, spec: ModelSpec) -> torch.Tensor:
    """Exact causal attention, differentiable. Returns [B, T, num_heads, head_dim]."""
    layer = spec.layer(call.layer_idx)
    length = call.query.shape[2]
    cos, sin = (t[:length].to(call.query.device)[None] for t in spec.rope_tables[layer.rope_table])
    query, key = (rotate(x, cos, sin, layer.rope_interleaved) for x in (call.query, call.key))
    if not layer.softcap and not layer.sliding_window:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, call.value, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return out.transpose(1, 2)
    group = layer.num_heads // layer.num_kv_heads
    score = query @ key.repeat_interleave(group, 1).transpose(2, 3) * layer.scale
    if layer.softcap:
        score = layer.softcap * torch.tanh(score / layer.softcap)
    position = torch.arange(length, device=score.device)
    age = position[:, None] - position
    hidden = (age < 0) | (age >= (layer.sliding_window or length + 1))
    weight = score.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weight @ call.value.repeat_interleave(group, 1)).transpose(1, 2)


class Recorder:
    """Handler that attends exactly and keeps each layer's key, value and query energy."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.query_energy: dict[int, torch.Tensor] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        layer = self.spec.layer(call.layer_idx)
        self.keys[layer.index], self.values[layer.index] = call.key, call.value
        energy = (call.query.detach() ** 2).mean((0, 2))  # [heads, head_dim]
        group = layer.num_heads // layer.num_kv_heads
        self.query_energy[layer.index] = energy.reshape(layer.num_kv_heads, group, -1).mean(1)
        return attend(call, self.spec)

    def clear(self) -> None:
        self.keys.clear()
        self.values.clear()
        self.query_energy.clear()


def capture_shard(
    model: torch.nn.Module,
    spec: ModelSpec,
    ids: torch.Tensor,
    settings: CaptureSettings,
    kept: Rows | None = None,
) -> dict[str, torch.Tensor]:
    """Run one batch of sequences and return what it shows.

    Args:
        model: float32, frozen, in memory.
        ids: int64 [B, L].
        kept: rows of the B * L tokens; None: all.
    Returns:
        For each layer i and kind: ``{i}.{kind}`` float16 [rows, KV * head_dim],
        ``{i}.{kind}.gradient`` float32 [rows, groups], and ``{i}.query_energy`` float32 [KV, head_dim] of all tokens.
    """
    recorder = Recorder(spec)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(settings.gradients))
    try:
        with intercept(model, recorder), torch.set_grad_enabled(settings.gradients):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
    finally:
        hook.remove()
    leaves = [recorder.keys[layer.index] for layer in spec.layers] + [
        recorder.values[layer.index] for layer in spec.layers
    ]
    gradients: Sequence[torch.Tensor] = torch.autograd.grad(loss, leaves) if settings.gradients else []
    count = len(spec.layers)
    shard: dict[str, torch.Tensor] = {}
    for layer in spec.layers:
        pair = (gradients[layer.index], gradients[layer.index + count]) if gradients else None
        shard |= layer_tensors(spec, layer.index, recorder, pair, settings, kept)
    return shard


def layer_tensors(
    spec: ModelSpec,
    index: int,
    recorder: Recorder,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
    settings: CaptureSettings,
    kept: Rows | None,
) -> dict[str, torch.Tensor]:
    """A layer's part of a shard, on the CPU; see ``capture_shard``.

    Args:
        recorder: has seen the layer.
        gradients: of the loss by its keys and its values, [B, KV, L, head_dim] each.
    """
    layer, found = spec.layers[index], {}
    rows = slice(None) if kept is None else torch.from_numpy(kept)
    for i, (kind, width) in enumerate(zip(KINDS, (settings.key_width, settings.value_width), strict=True)):
        heads = (recorder.keys, recorder.values)[i][index]
        found[f"{index}.{kind}"] = _rows(heads)[rows].half()
        if gradients is not None:
            gradient = gradients[i]
            if kind == "key" and settings.rotated_keys:
                cos, sin = (t[: heads.shape[2]].to(gradient)[None] for t in spec.rope_tables[layer.rope_table])
                gradient = rotate(gradient, cos, sin, layer.rope_interleaved)
            flat = _rows(gradient)
            norm = flat.reshape(flat.shape[0], -1, width).norm(dim=2)
            found[f"{index}.{kind}.gradient"] = norm.float()[rows]
    found[f"{index}.query_energy"] = recorder.query_energy[index].float()
    return {name: tensor.contiguous().cpu() for name, tensor in found.items()}


def shard_entries(
    spec: ModelSpec, rows: int, settings: CaptureSettings
) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor of a shard's file, which holds ``rows`` tokens: those of ``capture_shard``, and
    ``positions`` int32 [rows], the tokens' places in their sequences.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"positions": (torch.int32, (rows,))}
    for layer in spec.layers:
        elements = layer.num_kv_heads * layer.head_dim
        for kind, width in zip(KINDS, (settings.key_width, settings.value_width), strict=True):
            entries[f"{layer.index}.{kind}"] = (torch.float16, (rows, elements))
            if settings.gradients:
                entries[f"{layer.index}.{kind}.gradient"] = (torch.float32, (rows, elements // width))
        entries[f"{layer.index}.query_energy"] = (torch.float32, (layer.num_kv_heads, layer.head_dim))
    return entries


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[B, KV, L, d] -> [B * L, KV * d]."""
    return heads.detach().transpose(1, 2).flatten(2).flatten(0, 1)


def capture(
    model: torch.nn.Module,
    spec: ModelSpec,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    settings: CaptureSettings,
    directory: Path,
    progress: Callable[[int], None] = lambda sequences: None,
    shards: Collection[int] | None = None,
) -> None:
    """Write shard files into ``directory``; shards that are there already are not made again.

    Args:
        model: in memory, or of ``load_streamed``; both give the same bits.
        ids: int64 [N, L].
        shards: numbers of those to write, in a build of many processes; None: all.
        progress: called with the number of sequences after each shard.
    """
    todo = []
    for shard in shards_of(ids, settings, directory, shards):
        if shard.target.exists():
            progress(len(shard.ids))
        else:
            todo.append(shard)
    if streamed_weights(model) is not None:
        from gsrq_export.layerwise import capture_layerwise  # it captures with what is here

        capture_layerwise(model, spec, todo, settings, progress)
        return
    device = device_of(model)
    for shard in todo:
        tensors = capture_shard(model, spec, torch.from_numpy(shard.ids).to(device), settings, shard.kept)
        tensors["positions"] = shard.positions()
        write_atomic(shard.target, partial(save_file, tensors))
        progress(len(shard.ids))


def shards_of(
    ids: np.ndarray[Any, np.dtype[np.int64]],
    settings: CaptureSettings,
    directory: Path,
    numbers: Collection[int] | None = None,
) -> Iterator[Shard]:
    """The shards of all traffic, int64 [N, L], in order; only those of the given numbers, if any are given."""
    kept, length = kept_tokens(ids.size, settings.vectors, settings.seed), ids.shape[1]
    for number, start in enumerate(range(0, len(ids), settings.batch)):
        if numbers is not None and number not in numbers:
            continue
        batch = ids[start : start + settings.batch]
        rows = rows_of(kept, start * length, (start + len(batch)) * length)
        yield Shard(directory / shard_file(number), batch, rows)


@dataclass(frozen=True)
class Captured:
    """Reads what ``capture`` wrote, one layer and kind at a time."""

    directory: Path

    def _read(self, name: str) -> Iterator[torch.Tensor]:
        for file in sorted(self.directory.glob("shard-*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                yield tensors.get_tensor(name)

    def _slices(self, name: str) -> Iterator[Any]:
        for file in sorted(self.directory.glob("shard-*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                yield tensors.get_slice(name)

    def vectors(self, layer: LayerSpec, kind: str) -> torch.Tensor:
        """float16 [N, KV * head_dim]; keys before RoPE. Memory holds it once."""
        name = f"{layer.index}.{kind}"
        sizes = [int(part.get_shape()[0]) for part in self._slices(name)]
        out = torch.empty(sum(sizes), layer.num_kv_heads * layer.head_dim, dtype=torch.float16)
        for rows, part in zip(torch.split(out, sizes), self._read(name), strict=True):
            rows.copy_(part)
        return out

    def rows(self, layer: LayerSpec, kind: str, rows: slice) -> torch.Tensor:
        """Some rows of ``vectors``, without reading the others."""
        found, at = [], 0
        for file in sorted(self.directory.glob("shard-*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                stored = tensors.get_slice(f"{layer.index}.{kind}")
                count = stored.get_shape()[0]
                if at < rows.stop and rows.start < at + count:
                    found.append(stored[max(0, rows.start - at) : min(count, rows.stop - at)])
            at += count
        return torch.cat(found)

    def positions(self) -> torch.Tensor:
        """int32 [N]: each row's place in its sequence.

        Raises:
            GsrqError: an older version wrote the capture, which kept none.
        """
        try:
            return torch.cat(list(self._read("positions")))
        except SafetensorError:
            raise GsrqError(
                f"{self.directory}: the capture holds no positions, which codec.key_frame: rotated needs",
                "capture again with this version",
            ) from None

    def gradients(self, layer: LayerSpec, kind: str, width: int | None = None) -> torch.Tensor:
        """float32 [N, groups], of sub-vectors of ``width`` elements; None: of the parts captured."""
        norms = torch.cat(list(self._read(f"{layer.index}.{kind}.gradient")))
        if width is None:
            return norms
        return widened(norms, width * norms.shape[1] // (layer.num_kv_heads * layer.head_dim))

    def query_moment(self, layer: LayerSpec) -> torch.Tensor:
        """float32 [KV, head_dim]: mean square of the queries of each KV head's group."""
        return torch.stack(list(self._read(f"{layer.index}.query_energy"))).mean(0)


def key_center(keys: torch.Tensor) -> torch.Tensor:
    """The center of a rotated frame: the mean of keys before RoPE, [N, E] to float32 [E]."""
    return keys.double().mean(0).float()


def framed_keys(
    keys: torch.Tensor, positions: torch.Tensor, center: torch.Tensor, spec: ModelSpec, layer: LayerSpec
) -> torch.Tensor:
    """Keys brought to the rotated frame (cache/frame.py): what its codebook is trained and measured on.

    Args:
        keys: [N, KV * head_dim], before RoPE.
        positions: int [N].
        center: float32 [KV * head_dim].
    Returns:
        float32 [N, KV * head_dim], on the device of ``keys``.
    """
    cos, sin = (table.to(keys.device) for table in spec.rope_tables[layer.rope_table])
    parts = []
    for rows, at in zip(torch.split(keys, ENCODE_CHUNK), torch.split(positions.long(), ENCODE_CHUNK), strict=True):
        heads = rows.reshape(1, len(rows), layer.num_kv_heads, -1).transpose(1, 2)
        place = at.to(keys.device)[None]
        framed = to_frame(heads, center, cos[place], sin[place], layer.rope_interleaved)
        parts.append(framed[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def training_vectors(
    captured: Captured,
    spec: ModelSpec,
    layer: LayerSpec,
    kind: str,
    rotated_keys: bool,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a codebook of the layer's keys or values is trained on, [N, KV * head_dim], and its center."""
    vectors = captured.vectors(layer, kind).to(device)
    if kind != "key" or not rotated_keys:
        return vectors, None
    center = key_center(vectors)
    return framed_keys(vectors, captured.positions(), center, spec, layer), center


def attention_metric(
    captured: Captured, spec: ModelSpec, layer: LayerSpec, kind: str, width: int, outputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The attention-aware metric of a layer's keys or values: float32 [groups, width, width].

    It serves both frames of keys: a scale a rotary pair is what no rotation changes.

    Args:
        outputs: of ``output_projections``.
    """
    if kind == "value":
        return value_transform(outputs[layer.index].cpu(), layer, width)
    rope_dim = 2 * spec.rope_tables[layer.rope_table][0].shape[1]
    return key_transform(captured.query_moment(layer), layer, rope_dim, width)


class _StreamedProjections(Sequence[torch.Tensor]):
    """Weights that are read when they are asked for."""

    def __init__(self, weights: StreamedWeights, names: Sequence[str]) -> None:
        self._weights, self._names = weights, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return self._weights.weight(self._names[index])


@torch.no_grad()
def output_projections(model: torch.nn.Module, spec: ModelSpec) -> Sequence[torch.Tensor]:
    """Each layer's output projection [hidden, num_heads * head_dim]: the last linear map its attention module runs."""
    modules: dict[int, torch.nn.Module] = {}
    ran: list[torch.nn.Module] = []

    def note(call: AttentionCall) -> torch.Tensor:
        modules[spec.layer(call.layer_idx).index] = call.module
        return attend(call, spec)

    linears = {m: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [m.register_forward_hook(lambda m, args, output: ran.append(m)) for m in linears]
    try:
        with intercept(model, note):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    last = []
    for layer in spec.layers:
        inside = set(modules[layer.index].modules())
        last.append([m for m in ran if m in inside][-1])
    streamed = streamed_weights(model)
    if streamed is not None:
        return _StreamedProjections(streamed, [linears[m] for m in last])  # type: ignore[index]
    return [m.weight for m in last]  # type: ignore[misc]

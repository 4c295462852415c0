"""Capture: the model's keys (before RoPE) and values on sample traffic, with the weight that its loss gives them.

Traffic runs in shards of a few sequences; each shard is a file, so an interrupted capture goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
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
    """

    key_width: int
    value_width: int
    gradients: bool = True
    batch: int = 4  # sequences a shard
    rotated_keys: bool = False


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


class _Recorder:
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


def capture_shard(
    model: torch.nn.Module, spec: ModelSpec, ids: torch.Tensor, settings: CaptureSettings
) -> dict[str, torch.Tensor]:
    """Run one batch of sequences and return what it shows.

    Args:
        model: float32, frozen.
        ids: int64 [B, L].
    Returns:
        For each layer i and kind: ``{i}.{kind}`` float16 [B * L, KV * head_dim],
        ``{i}.{kind}.gradient`` float32 [B * L, groups], and ``{i}.query_energy`` float32 [KV, head_dim];
        and ``positions`` int32 [B * L], the tokens' places in their sequences.
    """
    recorder = _Recorder(spec)
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
    places = torch.arange(ids.shape[1], dtype=torch.int32).repeat(ids.shape[0])
    shard: dict[str, torch.Tensor] = {"positions": places}
    count = len(spec.layers)
    for layer in spec.layers:
        i = layer.index
        for j, (kind, width) in enumerate(zip(KINDS, (settings.key_width, settings.value_width), strict=True)):
            shard[f"{i}.{kind}"] = _rows(leaves[i + j * count]).half()
            if gradients:
                gradient = gradients[i + j * count]
                if kind == "key" and settings.rotated_keys:
                    cos, sin = (t[: ids.shape[1]].to(gradient)[None] for t in spec.rope_tables[layer.rope_table])
                    gradient = rotate(gradient, cos, sin, layer.rope_interleaved)
                rows = _rows(gradient)
                norm = rows.reshape(rows.shape[0], -1, width).norm(dim=2)
                shard[f"{i}.{kind}.gradient"] = norm.float()
        shard[f"{i}.query_energy"] = recorder.query_energy[i].float()
    return {name: tensor.contiguous().cpu() for name, tensor in shard.items()}


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
        ids: int64 [N, L].
        shards: numbers of those to write, in a build of many processes; None: all.
        progress: called with the number of sequences after each shard.
    """
    device = next(model.parameters()).device
    for number, start in enumerate(range(0, len(ids), settings.batch)):
        if shards is not None and number not in shards:
            continue
        batch = ids[start : start + settings.batch]
        target = directory / shard_file(number)
        if not target.exists():
            shard = capture_shard(model, spec, torch.from_numpy(batch).to(device), settings)
            write_atomic(target, partial(save_file, shard))
        progress(len(batch))


@dataclass(frozen=True)
class Captured:
    """Reads what ``capture`` wrote, one layer and kind at a time."""

    directory: Path

    def _read(self, name: str) -> Iterator[torch.Tensor]:
        for file in sorted(self.directory.glob("shard-*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                yield tensors.get_tensor(name)

    def vectors(self, layer: LayerSpec, kind: str) -> torch.Tensor:
        """float16 [N, KV * head_dim]; keys before RoPE."""
        return torch.cat(list(self._read(f"{layer.index}.{kind}")))

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


@contextmanager
def _last_linear(module: torch.nn.Module) -> Iterator[list[torch.nn.Linear]]:
    ran: list[torch.nn.Linear] = []
    linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, args, output: ran.append(m)) for m in linears]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def output_projections(model: torch.nn.Module, spec: ModelSpec) -> list[torch.Tensor]:
    """Each layer's output projection [hidden, num_heads * head_dim]: the last linear map its attention module runs."""
    modules: dict[int, torch.nn.Module] = {}

    def note(call: AttentionCall) -> torch.Tensor:
        modules[call.layer_idx] = call.module
        return attend(call, spec)

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with intercept(model, note):
        model(input_ids=ids, use_cache=False)
        weights = []
        for layer in spec.layers:
            with _last_linear(modules[layer.layer_idx]) as ran:
                model(input_ids=ids, use_cache=False)
            weights.append(ran[-1].weight)
    return weights

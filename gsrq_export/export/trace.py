"""A transformers decoder as an ONNX graph in memory, its attention replaced by ai.gsrq::GsrqAttention."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch.export import Dim

from gsrq_export.cache.reference import AttentionConfig, LayerCache, attributes
from gsrq_export.cache.rule import CacheRule
from gsrq_export.codec.codebook import LayerCodebooks
from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.export.function import DOMAIN, OPERATOR, OPERATOR_VERSION, OPSET
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import LayerSpec, ModelSpec

FOLD_LIMIT = 64  # elements
CACHE_PARTS = ("key_codes", "value_codes", "key_exact", "value_exact")


@dataclass(frozen=True)
class ExportSettings:
    """What the exported graph fixes about its cache.

    Attributes:
        exact_prefill: a call's own tokens are exact to each other.
        exact_dtype: of the exact buffers: float16 or float32.
        codes_by_head: how stored codes are ordered, see cache/rule.py.
    """

    rule: CacheRule = field(default_factory=CacheRule)
    beam: int = 1
    exact_prefill: bool = False
    exact_dtype: torch.dtype = torch.float16
    codes_by_head: bool = False

    def attention(self, layer: LayerSpec) -> AttentionConfig:
        """The operator's attributes in a layer."""
        return AttentionConfig(
            scale=layer.scale,
            rule=self.rule,
            beam=self.beam,
            rope_interleaved=layer.rope_interleaved,
            exact_prefill=self.exact_prefill,
            softcap=layer.softcap,
            sliding_window=layer.sliding_window,
            codes_by_head=self.codes_by_head,
        )


class _Step(torch.nn.Module):
    """One call of the decoder: tokens and caches in, logits of chosen tokens and caches out."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec, settings: ExportSettings, rotated_keys: bool) -> None:
        super().__init__()
        self.rotated_keys = rotated_keys
        self.model = model
        self.spec = spec
        self.settings = settings
        for i, (cos, sin) in enumerate(spec.rope_tables):
            self.register_buffer(f"rope_cos_{i}", cos)
            self.register_buffer(f"rope_sin_{i}", sin)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_lengths: torch.Tensor,
        new_lengths: torch.Tensor,
        logit_indices: torch.Tensor,
        *cache: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        present: list[list[torch.Tensor] | None] = [None] * len(self.spec.layers)

        def attend(call: AttentionCall) -> torch.Tensor:
            layer = self.spec.layer(call.layer_idx)
            if present[layer.index] is not None:
                raise UnsupportedModelError(
                    f"layer {call.layer_idx} attends twice in one step", "this architecture is not supported"
                )
            past = cache[4 * layer.index : 4 * layer.index + 4]
            batch, heads, steps, head_dim = call.query.shape
            output, *after = torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{OPERATOR}",
                (
                    *(call.query, call.key, call.value),
                    getattr(self, f"rope_cos_{layer.rope_table}"),
                    getattr(self, f"rope_sin_{layer.rope_table}"),
                    *(past_lengths, new_lengths),
                    *past,
                ),
                attrs={**attributes(self.settings.attention(layer), self.rotated_keys)},
                dtypes=[torch.float32, *(x.dtype for x in past)],
                shapes=[(batch, steps, heads, head_dim), *(x.shape for x in past)],
                version=OPERATOR_VERSION,
            )
            present[layer.index] = after
            return output

        def choose(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            """Only chosen tokens reach the LM head; what a family does to its logits comes after it."""
            hidden, *rest = args
            index = logit_indices[:, :, None].expand(-1, -1, hidden.shape[-1])
            return (hidden.gather(1, index), *rest)

        positions = past_lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose)  # type: ignore[operator]
        try:
            with intercept(self.model, attend), _no_dynamic_rope(self.model):
                logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        finally:
            hook.remove()
        missed = [layer.layer_idx for layer in self.spec.layers if present[layer.index] is None]
        if missed:
            raise UnsupportedModelError(f"layers {missed} own a cache but were not reached", "nothing was written")
        return (logits, *(x for parts in present for x in parts or ()))


def rotated_keys(codebooks: list[LayerCodebooks]) -> bool:
    """Whether the keys are coded in the rotated frame.

    Raises:
        GsrqError: those of some layers only; a model has one function for all its attention nodes.
    """
    found = {books.keys.center is not None for books in codebooks}
    if len(found) > 1:
        raise GsrqError(
            "some layers' keys are coded in the rotated frame, others before RoPE",
            "calibrate all layers with one codec.key_frame",
        )
    return found == {True}


def trace(
    model: torch.nn.Module, spec: ModelSpec, codebooks: list[LayerCodebooks], settings: ExportSettings
) -> ir.Model:
    """The graph, with inputs 0 to 10 of each attention node; its weights refer to the model's own memory.

    Raises:
        UnsupportedModelError: a layer that owns a cache has not exactly one attention node.
    """
    step = _Step(model, spec, settings, rotated_keys(codebooks)).eval()
    batch, tokens, outputs, capacity = (Dim(n) for n in ("batch", "tokens", "outputs", "capacity"))
    rows, width, wanted = 2, 5, 3
    args: list[torch.Tensor] = [
        torch.zeros(rows, width, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        torch.full((rows,), width),
        torch.zeros(rows, wanted, dtype=torch.int64),
    ]
    names = ["input_ids", "past_lengths", "new_lengths", "logit_indices"]
    caches: list[dict[int, Any]] = []
    for layer, books in zip(spec.layers, codebooks, strict=True):
        cache = LayerCache.empty(
            rows,
            2 * settings.rule.block + 7,
            layer.num_kv_heads,
            layer.head_dim,
            books.keys,
            books.values,
            settings.rule,
            settings.exact_dtype,
        )
        for part in CACHE_PARTS:
            args.append(getattr(cache, part))
            names.append(f"past.{layer.index}.{part}")
            caches.append({0: batch, 1: capacity} if part.endswith("codes") else {0: batch})
    with _quiet(), _plain_errors(), torch.no_grad():
        program = torch.onnx.export(
            step,
            tuple(args),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=["logits", *(n.replace("past", "present", 1) for n in names[4:])],
            dynamic_shapes={
                "input_ids": {0: batch, 1: tokens},
                "past_lengths": {0: batch},
                "new_lengths": {0: batch},
                "logit_indices": {0: batch, 1: outputs},
                "cache": tuple(caches),
            },
            optimize=False,
            verbose=False,
        )
        assert program is not None
        # Only shape arithmetic is folded. A weight's transpose, which is folded at any size by default, would
        # be a second copy of it in memory and, where it is tied to the embedding, on disk.
        optimizer.optimize_ir(
            program.model,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=lambda node: False if node.op_type == "Transpose" else None,
        )
    _check_nodes(program.model, spec)
    return program.model


def attention_nodes(graph: ir.Graph) -> dict[int, list[ir.Node]]:
    """The operator's nodes by the index of the layer whose cache they read."""
    found: dict[int, list[ir.Node]] = {}
    for node in graph.all_nodes():
        if node.domain == DOMAIN and node.op_type == OPERATOR:
            found.setdefault(int(node.inputs[7].name.split(".")[1]), []).append(node)
    return found


def _check_nodes(model: ir.Model, spec: ModelSpec) -> None:
    counts = {index: len(nodes) for index, nodes in attention_nodes(model.graph).items()}
    if counts != {layer.index: 1 for layer in spec.layers}:
        raise UnsupportedModelError(
            f"the graph has {counts} attention nodes a layer, and should have one for each of {len(spec.layers)}",
            "this architecture is not supported; nothing was written",
        )


@contextlib.contextmanager
def _no_dynamic_rope(model: torch.nn.Module) -> Iterator[None]:
    """Dynamic RoPE branches on the positions, which no graph can hold, to make angles that nothing reads here."""

    def unread(x: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].to(x.dtype)
        return angles, angles

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "rope_type", None) == "dynamic":
                stack.enter_context(patch.object(module, "forward", unread))
        yield


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.onnx wraps what the model raises while it is traced; our own refusals come out as they were."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, GsrqError):
                raise cause from None
            last, cause = cause, cause.__cause__ or cause.__context__
        raise UnsupportedModelError(
            f"torch.onnx cannot export the model: {type(last).__name__}: {str(last).strip().splitlines()[0]}",
            "nothing was written; the model's code must be traceable by torch.export",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns and logs about things that are meant, such as unused weights of the model's own RoPE."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

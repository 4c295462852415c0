"""Writes model.onnx: the traced decoder, its weights beside it, and its codebooks where they already are.

The weights are external data in model.onnx.data. The codebooks are external data too, and refer to the
bytes inside codebooks.safetensors, so that an artifact holds them once. Weights of a streamed model go from its
checkpoint to that file in parts; they are never all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from gsrq_export.codec.codebook import LayerCodebooks
from gsrq_export.codec.storage import CENTER, PARTS, SIDES, save_codebooks, tensor_locations, tensor_name
from gsrq_export.codec.storage import CODEBOOKS_FILE as CODEBOOKS_FILE
from gsrq_export.errors import GsrqError
from gsrq_export.export.function import OPERATOR_VERSION, build_function
from gsrq_export.export.streamed import refer_to_checkpoint
from gsrq_export.export.trace import ExportSettings, attention_nodes, rotated_keys, trace
from gsrq_export.model.introspect import ModelSpec
from gsrq_export.model.streaming import streamed_weights

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
INLINE_BYTES = 1024  # smaller tensors stay in model.onnx
IR_VERSION = 10  # of opset 21
ONNX_TYPES = {torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}


def export_onnx(
    model: torch.nn.Module,
    spec: ModelSpec,
    codebooks: list[LayerCodebooks],
    settings: ExportSettings,
    out_dir: Path,
    codebook_metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write model.onnx, model.onnx.data and codebooks.safetensors; equal arguments give equal bytes.

    Args:
        model: a transformers causal decoder, float32, on the CPU, in memory or of ``load_streamed``; both give the
            same bytes.
        spec: what inspect_model found; its max_length is the graph's.
        codebooks: one entry for each of spec.layers, in their order.
        out_dir: an existing directory.
        codebook_metadata: for the header of codebooks.safetensors.
    Returns:
        The path of model.onnx.
    Raises:
        GsrqError: the codebooks or the weights do not fit the model.
        UnsupportedModelError: a layer that owns a cache has not exactly one attention node. Nothing is
            written in either case.
    """
    _check(model, spec, codebooks, settings)
    streamed = streamed_weights(model)
    with streamed.placeholders() if streamed else nullcontext():
        graph = trace(model, spec, codebooks, settings)
    _forget_origins(graph)
    if streamed:
        refer_to_checkpoint(graph, streamed)
    written = [out_dir / name for name in (CODEBOOKS_FILE, WEIGHTS_FILE, MODEL_FILE)]
    try:
        save_codebooks(written[0], codebooks, codebook_metadata or {})
        _attach_codebooks(graph, codebooks, written[0])
        _move_weights(graph, out_dir)
        function = ir.serde.deserialize_function(build_function(rotated_keys(codebooks), settings.codes_by_head))
        graph.functions[function.identifier()] = function
        graph.ir_version = IR_VERSION
        graph.metadata_props["gsrq.op_version"] = str(OPERATOR_VERSION)
        graph.metadata_props["gsrq.cache"] = json.dumps(_cache_metadata(spec, codebooks, settings))
        written[2].write_bytes(ir.serde.serialize_model(graph).SerializeToString(deterministic=True))
        onnx.checker.check_model(str(written[2]))
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return written[2]


def _check(model: torch.nn.Module, spec: ModelSpec, codebooks: list[LayerCodebooks], settings: ExportSettings) -> None:
    mend = "use the codebooks that were calibrated for this model"
    if len(codebooks) != len(spec.layers):
        raise GsrqError(f"codebooks for {len(codebooks)} layers, the model has {len(spec.layers)}", mend)
    rotated_keys(codebooks)  # refuses a mixture
    for layer, books in zip(spec.layers, codebooks, strict=True):
        elements = layer.num_kv_heads * layer.head_dim
        for side, book in zip(SIDES, (books.keys, books.values), strict=True):
            if book.groups * book.width != elements:
                raise GsrqError(
                    f"layer {layer.layer_idx}: the {side} codebook codes {book.groups * book.width} elements, "
                    f"the layer's KV heads have {elements}",
                    mend,
                )
            if layer.head_dim % book.width and book.width % layer.head_dim:
                raise GsrqError(
                    f"layer {layer.layer_idx}: {side} sub-vectors of {book.width} elements neither divide "
                    f"head_dim {layer.head_dim} nor are a multiple of it",
                    "choose another sub-vector width and calibrate again",
                )
    if settings.exact_dtype not in ONNX_TYPES:
        raise GsrqError(f"exact_dtype {settings.exact_dtype} cannot be exported", "use float16 or float32")
    for name, weight in () if streamed_weights(model) else model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise GsrqError(
                f"weight {name} is {weight.dtype} on {weight.device}", "load the model in float32 on the CPU"
            )


def _forget_origins(model: ir.Model) -> None:
    """Drop the exporter's notes, which hold stack traces with paths, and its wrapper's part of the weights' names."""
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("model.")
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.metadata_props.clear()


def _attach_codebooks(model: ir.Model, codebooks: list[LayerCodebooks], path: Path) -> None:
    """Give each attention node its inputs 11 to 14, and 15 in the rotated frame; they lie in the safetensors file."""
    locations = tensor_locations(path)
    for index, nodes in attention_nodes(model.graph).items():
        books = dict(zip(SIDES, (codebooks[index].keys, codebooks[index].values), strict=True))
        parts = [(side, part, getattr(books[side], part)) for part in PARTS for side in SIDES]
        if books["key"].center is not None:
            parts.append(("key", CENTER, books["key"].center))
        node = nodes[0]
        node.resize_inputs(11 + len(parts))
        for at, (side, part, tensor) in enumerate(parts, 11):
            name = tensor_name(index, side, part)
            offset, length = locations[name]
            value = ir.Value(name=name)
            value.const_value = ir.ExternalTensor(
                CODEBOOKS_FILE,
                offset,
                length,
                ONNX_TYPES[tensor.dtype],
                shape=ir.Shape(list(tensor.shape)),
                name=name,
                base_dir=path.parent,
            )
            value.shape = ir.Shape(list(tensor.shape))
            value.dtype = ONNX_TYPES[tensor.dtype]
            model.graph.register_initializer(value)
            node.replace_input_with(at, value)


def _move_weights(model: ir.Model, out_dir: Path) -> None:
    """Stream the weights to their file, one tensor at a time."""
    moved = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes > INLINE_BYTES
    ]
    external = ir.external_data.convert_tensors_to_external(
        [value.const_value for value in moved], base_dir=out_dir, relative_path=WEIGHTS_FILE
    )
    for value, tensor in zip(moved, external, strict=True):
        value.const_value = tensor


def _cache_metadata(spec: ModelSpec, codebooks: list[LayerCodebooks], settings: ExportSettings) -> dict[str, object]:
    """What a runtime must know to allocate and drive the cache; runtime/metadata.py reads it."""
    layers = [
        {
            "layer_idx": layer.layer_idx,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "key_bytes": books.keys.code_bytes,
            "value_bytes": books.values.code_bytes,
        }
        for layer, books in zip(spec.layers, codebooks, strict=True)
    ]
    return {
        "sinks": settings.rule.sinks,
        "window": settings.rule.window,
        "block": settings.rule.block,
        "max_length": spec.max_length,
        "prefill": "exact" if settings.exact_prefill else "coded",
        "exact_dtype": str(settings.exact_dtype).removeprefix("torch."),
        **({"code_order": "head"} if settings.codes_by_head else {}),
        "layers": layers,
    }

"""An artifact's model without quantization, in float32, behind the same engine and server: what serve_load.py compares.

`write_exact` rewrites the artifact's graph: each attention node becomes onnxruntime's own GroupQueryAttention, with the
same weights, inputs and rotary tables, on a cache of exact float32 keys and values that is updated in place. The slots,
the batching and the server are those of gsrq_export.serve.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from gsrq_export.export.function import DOMAIN, OPERATOR
from gsrq_export.runtime.metadata import CacheMetadata
from gsrq_export.runtime.session import OrtModel
from gsrq_export.serve.slots import SlotCache
from gsrq_export.serve.triton_model import TritonPythonModel as Coded

SIDES = ("key", "value")
MICROSOFT = "com.microsoft"


def write_exact(artifact: Path, out: Path) -> None:
    """Write ``out``: model.onnx on an exact cache, its weights, and the tokenizer."""
    shutil.copytree(artifact / "tokenizer", out / "tokenizer")
    shutil.copyfile(artifact / "model.onnx.data", out / "model.onnx.data")
    model = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    metadata = CacheMetadata.from_properties({p.key: p.value for p in model.metadata_props})
    graph = model.graph
    heads = json.loads((artifact / "tokenizer/config.json").read_text())["num_attention_heads"]
    nodes, dropped = [*_lengths()], set()
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OPERATOR):
            nodes.append(node)
            continue
        layer = int(node.input[7].split(".")[1])
        nodes += _attention(node, layer, metadata, heads)
        dropped |= {*node.input[7:], *node.output[1:]}
    del graph.node[:]
    graph.node.extend(nodes)
    for kept in (graph.input, graph.output, graph.initializer, graph.value_info):
        rest = [entry for entry in kept if entry.name not in dropped]
        del kept[:]
        kept.extend(rest)
    shapes = {"reshape_tokens": [0, 0, -1]}
    graph.initializer.extend(helper.make_tensor(n, TensorProto.INT64, [len(v)], v) for n, v in shapes.items())
    graph.initializer.append(helper.make_tensor("exact_one", TensorProto.INT64, [], [1]))
    for layer, of in enumerate(metadata.layers):
        shape = ["batch", of.num_kv_heads, metadata.max_length, of.head_dim]
        for side in SIDES:
            graph.input.append(helper.make_tensor_value_info(f"past.{layer}.{side}", TensorProto.FLOAT, shape))
            graph.output.append(helper.make_tensor_value_info(f"present.{layer}.{side}", TensorProto.FLOAT, shape))
    del model.functions[:]
    keep = [o for o in model.opset_import if o.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend([*keep, helper.make_opsetid(MICROSOFT, 1)])
    (out / "model.onnx").write_bytes(model.SerializeToString())


def _lengths() -> list[Any]:
    """What GroupQueryAttention wants to know: each row's last position, and the longest row's tokens.

    A row without a new token computes one that nobody reads, in a place that its next token writes.
    """
    make = helper.make_node
    return [
        make("Max", ["new_lengths", "exact_one"], ["exact_new"]),
        make("Add", ["past_lengths", "exact_new"], ["exact_total"]),
        make("Sub", ["exact_total", "exact_one"], ["exact_last"]),
        make("Cast", ["exact_last"], ["seqlens_k"], to=TensorProto.INT32),
        make("ReduceMax", ["exact_total"], ["exact_most"], keepdims=0),
        make("Cast", ["exact_most"], ["total_sequence_length"], to=TensorProto.INT32),
    ]


def _attention(node: Any, layer: int, metadata: CacheMetadata, heads: int) -> list[Any]:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if given.get("sliding_window") or given.get("softcap"):
        raise SystemExit("a model with sliding windows or a cap has no exact server here")
    kv_heads, head_dim = metadata.layers[layer].num_kv_heads, metadata.layers[layer].head_dim
    name, made, flat = f"exact.{layer}", [], []
    for side, source in zip(("query", *SIDES), node.input[:3], strict=True):
        made.append(helper.make_node("Transpose", [source], [f"{name}.{side}.t"], perm=[0, 2, 1, 3]))
        made.append(helper.make_node("Reshape", [f"{name}.{side}.t", "reshape_tokens"], [f"{name}.{side}"]))
        flat.append(f"{name}.{side}")
    past = [f"past.{layer}.{side}" for side in SIDES]
    made.append(
        helper.make_node(
            "GroupQueryAttention",
            [*flat, *past, "seqlens_k", "total_sequence_length", *node.input[3:5]],
            [f"{name}.out", *(p.replace("past", "present", 1) for p in past)],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=given["scale"],
            do_rotary=1,
            rotary_interleaved=given.get("rope_interleaved", 0),
        )
    )
    shape = f"{name}.shape"
    made.append(helper.make_node("Constant", [], [shape], value_ints=[0, 0, -1, head_dim]))
    return [*made, helper.make_node("Reshape", [f"{name}.out", shape], [node.output[0]])]


class ExactModel(OrtModel):
    """The rewritten graph; of OrtModel only the checks of requests are used."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.enable_mem_pattern = False  # as the coded model has it
        if threads is not None:
            options.intra_op_num_threads = threads
        path = str(directory / "model.onnx")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.metadata = CacheMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map)
        self.vocab_size = next(o.shape[-1] for o in self._session.get_outputs() if o.name == "logits")
        self.backend = "cpu-op"  # caches are updated in place


class ExactCache(SlotCache):
    """Keys and values of all tokens, float32, in slots; a page is as many tokens as one of the coded cache."""

    def __init__(self, model: ExactModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self.lengths = np.zeros(slots, np.int64)
        self._in_place = True
        self._mappings, self._tensors = {}, {}
        for layer, of in enumerate(model.metadata.layers):
            for side in SIDES:
                self._allocate(f"{layer}.{side}", (slots, of.num_kv_heads, model.max_length, of.head_dim), "float32")

    @property
    def page_bytes(self) -> int:
        of = self.model.metadata.layers
        return self.model.metadata.rule.block * sum(8 * layer.num_kv_heads * layer.head_dim for layer in of)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.model.metadata.rule.block)

    def move(self, source: int, target: int) -> None:
        used = int(self.lengths[source])
        for tensor in self._tensors.values():
            tensor[target, :, :used] = tensor[source, :, :used]
        self.lengths[target] = self.lengths[source]
        self.release(source)


class TritonPythonModel(Coded):
    """The server's model, on the exact graph."""

    @staticmethod
    def load(artifact: Path, threads: int | None, library: Any, slots: int) -> tuple[OrtModel, SlotCache]:
        model = ExactModel(artifact, threads)
        return model, ExactCache(model, slots)

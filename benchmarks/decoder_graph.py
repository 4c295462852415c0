"""A LLaMA-shaped decoder written as ONNX, with ai.gsrq::GsrqAttention or com.microsoft::GroupQueryAttention.

The two graphs differ in the attention node and its cache alone. Matrices are inputs, so that a caller binds memory
that it holds; codebooks and rotary tables are initializers, in a file beside the model. ``reference_step`` is one step
of the same model in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from gsrq_export.cache.reference import AttentionConfig, attributes
from gsrq_export.codec.codebook import LayerCodebooks

Attention = Literal["gsrq", "rotated", "gqa"]  # "rotated": gsrq with keys coded after RoPE
KIND = {torch.float16: TensorProto.FLOAT16, torch.float32: TensorProto.FLOAT}
PARTS = ("key_codes", "value_codes", "key_exact", "value_exact")
BOOKS = ("key_codebooks", "value_codebooks", "key_transform", "value_transform")
PAST = {"gsrq": PARTS, "rotated": PARTS, "gqa": ("key", "value")}
CONSTANTS = "constants.data"
MODEL = "model.onnx"


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder; LLaMA-3-8B's unless said."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    vocab: int = 128256
    theta: float = 500000.0
    epsilon: float = 1e-5

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights, by the graph's input names. Matrices are [in, out]."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"embed": (self.vocab, self.hidden)}
        for i in range(self.layers):
            found |= {f"{i}.q": (self.hidden, wide), f"{i}.k": (self.hidden, narrow), f"{i}.v": (self.hidden, narrow)}
            found |= {f"{i}.o": (wide, self.hidden), f"{i}.norm": (self.hidden,), f"{i}.mlp_norm": (self.hidden,)}
            found |= {f"{i}.gate": (self.hidden, self.mlp), f"{i}.up": (self.hidden, self.mlp)}
            found[f"{i}.down"] = (self.mlp, self.hidden)
        return found | {"norm": (self.hidden,), "head": (self.hidden, self.vocab)}

    def rope(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [positions, head_dim / 2]."""
        half = self.head_dim // 2
        angle = torch.arange(positions).double()[:, None] * self.theta ** (-torch.arange(half).double() / half)
        return angle.cos().float(), angle.sin().float()


def random_weights(decoder: Decoder, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal matrices of standard deviation 1 / sqrt(inputs), norms of ones; no two share memory."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in decoder.matrices().items():
        if len(shape) == 1:
            found[name] = torch.ones(shape, dtype=dtype, device=device)
        else:
            scale = 1.0 if name == "embed" else shape[0] ** -0.5
            found[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)
    return found


class _Graph:
    """Nodes, and constants that go to a file."""

    def __init__(self, data: Path) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data = data
        self._file = data.open("wb")

    def op(self, kind: str, *inputs: str, name: str, domain: str = "", **attrs: int | float | list[int]) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attrs))
        return name

    def constant(self, name: str, tensor: torch.Tensor) -> str:
        array = tensor.contiguous().cpu().numpy()
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        if array.nbytes < 1024:
            proto.raw_data = array.tobytes()
        else:
            self._file.write(bytes(-self._file.tell() % 4096))
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._data.name), ("offset", self._file.tell()), ("length", array.nbytes)):
                proto.external_data.add(key=key, value=str(value))
            self._file.write(memoryview(array).cast("B"))
        self.initializers.append(proto)
        return name

    def close(self) -> None:
        self._file.close()


def write_decoder(
    directory: Path,
    decoder: Decoder,
    attention: Attention,
    dtype: torch.dtype,
    positions: int,
    config: AttentionConfig | None = None,
    codebooks: Callable[[int], LayerCodebooks] | None = None,
) -> Path:
    """Write model.onnx and its constants, for one new token a row; returns the model's path.

    Args:
        dtype: of weights, activations and exact cache; float16 or float32.
        positions: rows of the rotary tables.
        config, codebooks: but for "gqa"; codebooks(layer) are copied into the file once a layer. Where codes lie by
            head, capacities are multiples of CODE_TILE.

    Inputs besides the weights: input_ids int64 [B, 1]; but for "gqa" past_lengths and new_lengths int64 [B] and
    past.{i}.{part}; for "gqa" seqlens_k int32 [B] (tokens after the call, less one), total_sequence_length int32 [1],
    past.{i}.key and past.{i}.value [B, kv_heads, capacity, head_dim]. Outputs: logits [B, 1, vocab], present.{i}.*.
    """
    if attention != "gqa" and (config is None or codebooks is None):
        raise ValueError("the coded graph needs a config and codebooks")
    d = decoder
    g = _Graph(directory / CONSTANTS)
    cos, sin = d.rope(positions)
    if attention == "gqa":
        cos, sin = cos.to(dtype), sin.to(dtype)
    g.constant("cos", cos)
    g.constant("sin", sin)
    # One token a row: [B, 1, H * d] and [B, H, 1, d] are the same memory.
    split = {n: g.constant(f"split{n}", torch.tensor([0, n, 1, d.head_dim])) for n in {d.heads, d.kv_heads}}
    joined = g.constant("joined", torch.tensor([0, 0, d.heads * d.head_dim]))

    def heads(x: str, n: int) -> str:
        return g.op("Reshape", x, split[n], name=f"{x}_heads")

    def coded(i: int, q: str, k: str, v: str) -> str:
        assert config is not None
        assert codebooks is not None
        books = codebooks(i)
        tensors = (books.keys.codewords, books.values.codewords, books.keys.transform, books.values.transform)
        constants = [g.constant(f"{i}.{name}", t) for name, t in zip(BOOKS, tensors, strict=True)]
        inputs = [heads(q, d.heads), heads(k, d.kv_heads), heads(v, d.kv_heads), "cos", "sin"]
        inputs += ["past_lengths", "new_lengths", *(f"past.{i}.{part}" for part in PARTS), *constants]
        center = books.keys.center
        if center is not None:
            inputs.append(g.constant(f"{i}.key_center", center))
        outputs = [f"{i}.attention", *(f"present.{i}.{part}" for part in PARTS)]
        found = attributes(config, center is not None)
        g.nodes.append(helper.make_node("GsrqAttention", inputs, outputs, domain="ai.gsrq", **found))
        return g.op("Reshape", f"{i}.attention", joined, name=f"{i}.joined")

    def grouped(i: int, q: str, k: str, v: str) -> str:
        inputs = [q, k, v, f"past.{i}.key", f"past.{i}.value", "seqlens_k", "total_sequence_length", "cos", "sin"]
        outputs = [f"{i}.attention", f"present.{i}.key", f"present.{i}.value"]
        sizes = {"num_heads": d.heads, "kv_num_heads": d.kv_heads, "do_rotary": 1}
        g.nodes.append(helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft", **sizes))
        return outputs[0]

    def matmul(x: str, weight: str) -> str:
        return g.op("MatMul", x, weight, name=f"{weight}_out")

    def add_norm(x: str, residual: str, weight: str) -> tuple[str, str]:
        """The norm of a sum, and the sum."""
        outputs = [f"{weight}_out", "", "", f"{weight}_sum"]
        inputs = [x, residual, weight]
        more = {"domain": "com.microsoft", "epsilon": d.epsilon}
        g.nodes.append(helper.make_node("SkipSimplifiedLayerNormalization", inputs, outputs, **more))
        return outputs[0], outputs[3]

    residual = g.op("Gather", "embed", "input_ids", name="embedded")
    x = g.op("SimplifiedLayerNormalization", residual, "0.norm", name="0.norm_out", axis=-1, epsilon=d.epsilon)
    for i in range(d.layers):
        attend = grouped if attention == "gqa" else coded
        seen = attend(i, matmul(x, f"{i}.q"), matmul(x, f"{i}.k"), matmul(x, f"{i}.v"))
        x, residual = add_norm(matmul(seen, f"{i}.o"), residual, f"{i}.mlp_norm")
        gate = matmul(x, f"{i}.gate")
        gate = g.op("Mul", gate, g.op("Sigmoid", gate, name=f"{i}.sigmoid"), name=f"{i}.silu")
        x = g.op("Mul", gate, matmul(x, f"{i}.up"), name=f"{i}.gated")
        x, residual = add_norm(matmul(x, f"{i}.down"), residual, f"{i + 1}.norm" if i + 1 < d.layers else "norm")
    g.op("MatMul", x, "head", name="logits")
    g.close()

    def info(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    kind = KIND[dtype]
    inputs = [info("input_ids", TensorProto.INT64, ["batch", 1])]
    if attention != "gqa":
        inputs += [info(name, TensorProto.INT64, ["batch"]) for name in ("past_lengths", "new_lengths")]
    else:
        inputs.append(info("seqlens_k", TensorProto.INT32, ["batch"]))
        inputs.append(info("total_sequence_length", TensorProto.INT32, [1]))
    inputs += [info(name, kind, list(shape)) for name, shape in d.matrices().items()]
    outputs = [info("logits", kind, ["batch", 1, d.vocab])]
    for i in range(d.layers):
        for part in PAST[attention]:
            of = TensorProto.INT8 if part.endswith("codes") else kind
            sizes: list[int | str] = ["batch", "capacity", f"{i}.{part}.bytes"]
            if not part.endswith("codes"):
                sizes = ["batch", d.kv_heads, "slots", d.head_dim]
            inputs.append(info(f"past.{i}.{part}", of, sizes))
            outputs.append(info(f"present.{i}.{part}", of, sizes))
    graph = helper.make_graph(g.nodes, "decoder", inputs, outputs, g.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.gsrq", 1), helper.make_opsetid("com.microsoft", 1)]
    path = directory / MODEL
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def reference_step(
    decoder: Decoder,
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
    attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits float32 [B, T, vocab] of new tokens, in float32.

    Args:
        attend: (layer, query [B, heads, T, d], key, value [B, kv_heads, T, d]) to [B, T, heads, d]; rotates and
            keeps the cache.
    """
    d = decoder

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (d.hidden,), weights[name].float(), d.epsilon)

    def heads(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.reshape(*x.shape[:2], n, d.head_dim).transpose(1, 2)

    def times(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name].float()

    x = weights["embed"][ids].float()
    for i in range(d.layers):
        normed = norm(x, f"{i}.norm")
        split = zip("qkv", (d.heads, d.kv_heads, d.kv_heads), strict=True)
        q, k, v = (heads(times(normed, f"{i}.{name}"), n) for name, n in split)
        x = x + times(attend(i, q, k, v).flatten(2), f"{i}.o")
        normed = norm(x, f"{i}.mlp_norm")
        x = x + times(torch.nn.functional.silu(times(normed, f"{i}.gate")) * times(normed, f"{i}.up"), f"{i}.down")
    return times(norm(x, "norm"), "head")


def relative_error(got: torch.Tensor | np.ndarray, expected: torch.Tensor) -> float:
    """Of the norms; NaN where anything is."""
    got = torch.as_tensor(got).to(expected.device).double()
    return float((got - expected.double()).norm() / expected.double().norm())

"""A one-node ONNX model of ai.gsrq::GsrqAttention run by onnxruntime with the native library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from op_tensors import BOOKS, CACHE, CENTER, FEEDS, book_tensors

from gsrq_export.cache.reference import AttentionConfig, LayerCache, attributes
from gsrq_export.codec.codebook import Codebook

ONNX_TYPE = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
}


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array; bfloat16, which numpy lacks, as int16."""
    tensor = tensor.contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def build_model(
    exact: torch.dtype,
    attrs: dict[str, int | float],
    initializers: dict[str, torch.Tensor],
    io: torch.dtype = torch.float32,
    center: bool = False,
) -> bytes:
    """Inputs of the operator that are no initializers become inputs of the graph, with all dimensions free."""
    types = dict.fromkeys(FEEDS, TensorProto.FLOAT) | {"past_lengths": TensorProto.INT64, "new_lengths": 7}
    types |= dict.fromkeys(FEEDS[:3], ONNX_TYPE[io])
    types |= {"key_codes": TensorProto.INT8, "value_codes": TensorProto.INT8}
    types |= {"key_exact": ONNX_TYPE[exact], "value_exact": ONNX_TYPE[exact]}
    types |= dict.fromkeys(BOOKS[:2], TensorProto.FLOAT16) | dict.fromkeys(BOOKS[2:], TensorProto.FLOAT)
    types |= {CENTER: TensorProto.FLOAT} if center else {}
    books = [*BOOKS, CENTER] if center else BOOKS
    outputs = ["output", *(f"present_{name}" for name in CACHE)]
    node = helper.make_node("GsrqAttention", [*FEEDS, *CACHE, *books], outputs, domain="ai.gsrq", **attrs)
    graph = helper.make_graph(
        [node],
        "gsrq",
        [
            helper.make_tensor_value_info(name, types[name], None)
            for name in (*FEEDS, *CACHE, *books)
            if name not in initializers
        ],
        [helper.make_tensor_value_info("output", ONNX_TYPE[io], None)]
        + [helper.make_tensor_value_info(f"present_{name}", types[name], None) for name in CACHE],
        [
            helper.make_tensor(name, ONNX_TYPE[t.dtype], list(t.shape), raw(t).tobytes(), raw=True)
            for name, t in initializers.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.gsrq", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def to_ort(tensor: torch.Tensor) -> ort.OrtValue:
    if tensor.dtype == torch.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw(tensor), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(raw(tensor))


def from_ort(value: ort.OrtValue, dtype: torch.dtype) -> torch.Tensor:
    """A copy of an OrtValue's memory."""
    size = int(np.prod(value.shape())) * torch.tensor([], dtype=dtype).element_size()
    memory = ctypes.string_at(value.data_ptr(), size)
    return (
        torch.frombuffer(bytearray(memory), dtype=dtype).reshape(value.shape())
        if size
        else torch.empty(value.shape(), dtype=dtype)
    )


class OpSession:
    """A session; codebooks are initializers unless constant=False, cos and sin where given as tables.

    Tensors go in and out by way of the CPU. io: the type of query, key, value and output.
    """

    def __init__(
        self,
        library: Path,
        keys: Codebook,
        values: Codebook,
        config: AttentionConfig,
        exact: torch.dtype = torch.float16,
        threads: int = 2,
        constant: bool = True,
        provider: str = "CPUExecutionProvider",
        provider_options: dict[str, str] | None = None,
        io: torch.dtype = torch.float32,
        tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        **overrides: int | float,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(library))
        books = book_tensors(keys, values)
        initializers = (books if constant else {}) | dict(zip(("cos", "sin"), tables or (), strict=False))
        rotated = keys.center is not None
        model = build_model(exact, attributes(config, rotated) | overrides, initializers, io, rotated)
        self.session = ort.InferenceSession(model, options, providers=[(provider, provider_options or {})])
        assert provider in self.session.get_providers()
        self.books = {} if constant else {name: to_ort(t) for name, t in books.items()}
        self.exact, self.io = exact, io
        self.feeds = [name for name in FEEDS if name not in initializers]

    def run(self, tensors: dict[str, torch.Tensor], cache: LayerCache) -> tuple[torch.Tensor, LayerCache]:
        """tensors: by FEEDS' names. Inputs keep their content."""
        binding = self.session.io_binding()
        values = {name: to_ort(tensors[name]) for name in self.feeds}
        values |= {name: to_ort(getattr(cache, name)) for name in CACHE} | self.books
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name)
        self.session.run_with_iobinding(binding)
        output, *present = binding.get_outputs()
        types = [torch.int8, torch.int8, self.exact, self.exact]
        return from_ort(output, self.io), LayerCache(
            *(from_ort(value, dtype) for value, dtype in zip(present, types, strict=True))
        )

"""The TensorRT plugin driven from Python through plugins/trt_harness.cpp, on the CPU or with tensors on a GPU.

What is needed is named by environment variables, else tests skip:
    GSRQ_TENSORRT_HEADERS    folders of NvInfer.h, one a major version, separated as PATH is: to build both
    GSRQ_TENSORRT10_LIBRARY, GSRQ_TENSORRT10_HARNESS (and with 11)    both, built before
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from attention_cases import Case
from op_tensors import BOOKS, CACHE, CENTER, FEEDS, book_tensors

from gsrq_export import native

HEADERS = "GSRQ_TENSORRT_HEADERS"
TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.bfloat16: 7, torch.int64: 8}
INT32, FLOAT32 = 5, 1  # of nvinfer1::PluginFieldType
OUTPUTS = 5


class Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("type", "format", "rank")),
        *((name, ctypes.c_int64 * 8) for name in ("dims", "least", "most")),
    ]


class Field(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    ]


Shape = Sequence[int]
Desc = tuple[torch.dtype, Shape]


def tensors(descs: Sequence[Desc], most: Mapping[int, Shape] | None = None, formats: Mapping[int, int] | None = None):  # type: ignore[no-untyped-def]
    """An array of Tensor; most: the largest shapes where they vary, formats: those that are not linear."""
    out = (Tensor * len(descs))()
    for i, (dtype, shape) in enumerate(descs):
        out[i].type, out[i].format, out[i].rank = TYPES[dtype], (formats or {}).get(i, 0), len(shape)
        largest = (most or {}).get(i, shape)
        for d, size in enumerate(shape):
            out[i].dims[d], out[i].least[d], out[i].most[d] = size, min(size, largest[d]), largest[d]
    return out


class Plugin:
    """One plugin object."""

    def __init__(self, harness: Harness, pointer: int) -> None:
        self.harness, self.pointer = harness, pointer
        self._call = harness.call

    def text(self, name: str) -> list[str]:
        function = getattr(self.harness.library, f"harness_{name}")
        function.restype = ctypes.c_char_p
        return function(ctypes.c_void_p(self.pointer)).decode().splitlines()  # type: ignore[no-any-return]

    def another(self, how: str) -> Plugin:
        """how: clone, attach (to a context) or reload (from a plan)."""
        return Plugin(self.harness, self._call(how, self, restype=ctypes.c_void_p))

    def aliased(self) -> list[int]:
        return [self._call("aliased", self, i) for i in range(OUTPUTS)]

    def supports(self, descs: Sequence[Desc], pos: int, formats: Mapping[int, int] | None = None) -> bool:
        return bool(self._call("supports", self, pos, tensors(descs, formats=formats), len(descs) - OUTPUTS, OUTPUTS))

    def output_types(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        given, out = (ctypes.c_int32 * len(inputs))(*(TYPES[t] for t in inputs)), (ctypes.c_int32 * OUTPUTS)()
        assert self._call("output_types", self, given, len(inputs), out, OUTPUTS) == 0
        return [next(t for t, code in TYPES.items() if code == i) for i in out]

    def output_shapes(self, inputs: Sequence[Desc]) -> list[list[int]]:
        """Each output's dimensions as input * 8 + dimension."""
        out = (ctypes.c_int32 * (9 * OUTPUTS))()
        assert self._call("output_shapes", self, tensors(inputs), len(inputs), OUTPUTS, out) == 0
        return [list(out[9 * o + 1 : 9 * o + 1 + out[9 * o]]) for o in range(OUTPUTS)]

    def configure(
        self, inputs: Sequence[Desc], outputs: Sequence[Desc], most: Mapping[int, Shape] | None = None
    ) -> int:
        return self._call("configure", self, tensors(inputs, most), len(inputs), tensors(outputs), len(outputs))  # type: ignore[no-any-return]

    def workspace(
        self, inputs: Sequence[Desc], outputs: Sequence[Desc], most: Mapping[int, Shape] | None = None
    ) -> int:
        given = (tensors(inputs, most), len(inputs), tensors(outputs), len(outputs))
        return self._call("workspace", self, *given, restype=ctypes.c_int64)  # type: ignore[no-any-return]

    def shape_change(self, inputs: Sequence[Desc], outputs: Sequence[Desc]) -> int:
        return self._call("shape_change", self, tensors(inputs), len(inputs), tensors(outputs), len(outputs))  # type: ignore[no-any-return]

    def enqueue(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], workspace: torch.Tensor, stream: int
    ) -> int:
        given = [(t.dtype, tuple(t.shape)) for t in inputs], [(t.dtype, tuple(t.shape)) for t in outputs]
        return self._call(  # type: ignore[no-any-return]
            "enqueue",
            self,
            tensors(given[0]),
            len(inputs),
            tensors(given[1]),
            len(outputs),
            (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs)),
            (ctypes.c_void_p * len(outputs))(*(t.data_ptr() for t in outputs)),
            ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_void_p(stream),
        )


class Harness:
    """A loaded harness with the plugin library open.

    Args:
        library, plugin: of one major version.
    """

    def __init__(self, library: Path, plugin: Path) -> None:
        # A copy of its own: ctypes would give back a library that has another plugin open.
        self._directory = tempfile.TemporaryDirectory(prefix="gsrq-harness-")
        self.path = str(shutil.copy(library, self._directory.name))
        self.library = ctypes.CDLL(self.path)
        self.plugin = plugin
        assert self.call("open", str(plugin).encode()) == 0, self.messages()

    def call(self, name: str, *arguments: object, restype: type = ctypes.c_int) -> int:
        function = getattr(self.library, f"harness_{name}")
        function.restype = restype
        return function(*(ctypes.c_void_p(a.pointer) if isinstance(a, Plugin) else a for a in arguments))  # type: ignore[no-any-return]

    def messages(self) -> str:
        """What was logged since the last call."""
        self.library.harness_messages.restype = ctypes.c_char_p
        return self.library.harness_messages().decode()  # type: ignore[no-any-return]

    def create(self, attributes: Mapping[str, int | float], runtime: bool = False) -> Plugin | None:
        """None where the plugin refuses."""
        kept: list[object] = []
        fields = (Field * len(attributes))()
        for field, (name, value) in zip(fields, attributes.items(), strict=True):
            data = ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)
            kept.append(data)
            field.name, field.length, field.data = name.encode(), 1, ctypes.addressof(data)
            field.type = FLOAT32 if isinstance(value, float) else INT32
        pointer = self.call("create", fields, len(attributes), int(runtime), restype=ctypes.c_void_p)
        return Plugin(self, pointer) if pointer else None


@lru_cache
def harness(major: int) -> Harness:
    """Built or found; skips where there is nothing to build it from."""
    target = native.TENSORRT[major]
    named = os.environ.get(target.variable), os.environ.get(f"GSRQ_TENSORRT{major}_HARNESS")
    if all(named):
        return Harness(Path(str(named[1])), Path(str(named[0])))
    folders = [Path(folder) for folder in os.environ.get(HEADERS, "").split(os.pathsep) if folder]
    headers = next((folder for folder in folders if native.tensorrt_target(folder) is target), None)
    if headers is None:
        pytest.skip(f"no headers of TensorRT {major}: name their folder in {HEADERS}")
    if native.nvcc() is None:
        pytest.skip("nvcc is not installed")
    plugin = native.find(target) or native.build(target=target, architectures=("90a",), tensorrt_headers=headers)
    with tempfile.TemporaryDirectory(prefix="gsrq-harness-") as directory:
        built = Path(directory) / "libtrt_harness.so"
        source = Path(__file__).parent / "plugins" / "trt_harness.cpp"
        options = ["-std=c++17", "-shared", "-cudart", "none", "-Xcompiler=-fPIC", "-isystem", headers, "-ldl"]
        subprocess.run([str(native.nvcc()), *options, source, "-o", built], check=True)  # it knows CUDA's headers
        return Harness(built, plugin)


def input_tensors(
    case: Case, feeds: Mapping[str, torch.Tensor], cache: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The operator's inputs in order."""
    books = book_tensors(case.keys, case.values)
    order = [*FEEDS, *CACHE, *BOOKS, *([CENTER] if case.rotated else [])]
    return [({**feeds, **cache, **books})[name] for name in order]


def descs(inputs: Sequence[torch.Tensor]) -> tuple[list[Desc], list[Desc]]:
    """Types and shapes of inputs and, by the operator's rule, of outputs."""
    given = [(t.dtype, tuple(t.shape)) for t in inputs]
    batch, heads, steps, head_dim = given[0][1]
    return given, [(given[0][0], (batch, steps, heads, head_dim)), *given[7:11]]

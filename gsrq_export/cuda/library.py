"""gsrq/cuda/gsrq_cuda.h for ctypes: its structures, its functions, its errors.

tests/plugins/test_cuda_binding.py compiles the header and compares every offset.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gsrq_export import native
from gsrq_export.errors import GsrqError

ABI = 3
MOST_STAGES = 256  # of a codebook
INSPECT_SCRATCH = 4096  # bytes
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CodebookStruct(ctypes.Structure):
    _fields_ = [
        ("groups", c_int32),
        ("stages", c_int32),
        ("width", c_int32),
        ("planes", c_int32),
        ("codewords", c_void_p),
        ("transform", c_void_p),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("heads", "kv_heads", "head_dim", "half_rope", "positions")),
        *((name, c_int32) for name in ("sinks", "window", "block", "beam", "sliding_window")),
        *((name, c_int32) for name in ("rope_interleaved", "exact_prefill", "geometric", "codes_by_head")),
        ("scale", c_float),
        ("softcap", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", CodebookStruct),
        ("values", CodebookStruct),
        ("key_center", c_void_p),
        ("exponents", c_int32 * MOST_STAGES),
    ]


class CallStruct(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("batch", "steps", "dtype", "exact_dtype")),
        ("max_total", c_int64),
        ("capacity", c_int64),
        *((name, c_void_p) for name in ("query", "key", "value", "past_lengths", "new_lengths")),
        *((name, c_void_p) for name in ("key_codes", "value_codes", "key_exact", "value_exact", "block_table")),
        ("page", c_int32),
        ("table_stride", c_int32),
        ("output", c_void_p),
    ]


class RowsStruct(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("query", "key", "value", "output")),
        *((name, c_int64) for name in ("query_stride", "key_stride", "value_stride", "output_stride")),
        *((name, c_void_p) for name in ("starts", "key_pages", "value_pages")),
        ("key_page_bytes", c_int64),
        ("value_page_bytes", c_int64),
        ("exact_table", c_void_p),
        ("exact_stride", c_int64),
        ("exact_pages", c_int32),
    ]


class ClusteringStruct(ctypes.Structure):
    _fields_ = [
        ("groups", c_int32),
        ("width", c_int32),
        ("rows", c_int64),
        *((name, c_void_p) for name in ("vectors", "weights", "norms")),
    ]


_CLUSTERING = POINTER(ClusteringStruct)
_LAYER, _CALL = POINTER(LayerStruct), POINTER(CallStruct)
_PART = (c_int, [_LAYER, _CALL, c_void_p, c_void_p, c_int64, c_void_p])
PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "gsrq_cuda_abi": (c_int32, []),
    "gsrq_cuda_error": (c_char_p, []),
    "gsrq_cuda_architectures": (c_char_p, []),
    "gsrq_cuda_inspect": (c_int, [_LAYER, c_void_p, c_void_p]),
    "gsrq_cuda_prepared_bytes": (c_int64, [_LAYER]),
    "gsrq_cuda_prepare": (c_int, [_LAYER, c_void_p, c_void_p]),
    "gsrq_cuda_workspace_bytes": (c_int64, [_LAYER, _CALL]),
    "gsrq_cuda_attention": _PART,
    "gsrq_cuda_encode": _PART,
    "gsrq_cuda_attend": _PART,
    "gsrq_cuda_append": (c_int, [_LAYER, _CALL, c_void_p]),
    "gsrq_cuda_rows_workspace_bytes": (c_int64, [_LAYER, _CALL]),
    "gsrq_cuda_attention_rows": (c_int, [_LAYER, _CALL, POINTER(RowsStruct), c_void_p, c_void_p, c_int64, c_void_p]),
    "gsrq_cuda_encode_vectors": (
        c_int,
        [_LAYER, c_int32, c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
    ),
    "gsrq_cuda_clustering_workspace_bytes": (c_int64, [_CLUSTERING]),
    "gsrq_cuda_clustering_assign": (c_int, [_CLUSTERING, c_void_p, c_int32, *[c_void_p] * 4, c_int64, c_void_p]),
    "gsrq_cuda_clustering_update": (c_int, [_CLUSTERING, c_int32, *[c_void_p] * 5, c_int64, c_void_p]),
}


class CudaLibrary:
    """The library's functions, declared; a failure becomes a GsrqError with the library's reason.

    Raises:
        GsrqError: the file cannot be loaded, lacks a function, or is of another version of the interface.
    """

    def __init__(self, path: Path) -> None:
        again = "build it again: gsrq plugins build --cuda"
        try:
            self._c = ctypes.CDLL(str(path.resolve()))
            for name, (result, arguments) in PROTOTYPES.items():
                function = getattr(self._c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise GsrqError(f"{path} is no library of GSRQ's CUDA kernels: {error}", again) from error
        if (abi := self._c.gsrq_cuda_abi()) != ABI:
            raise GsrqError(f"{path} has interface version {abi}, this program needs {ABI}", again)
        self.path = path
        self.architectures = tuple(self._c.gsrq_cuda_architectures().decode().split(","))

    def bytes(self, name: str, *arguments: Any) -> int:
        """The result of gsrq_cuda_``name``_bytes."""
        size = int(getattr(self._c, f"gsrq_cuda_{name}_bytes")(*arguments))
        if size < 0:
            raise self._error(name)
        return size

    def run(self, name: str, *arguments: Any) -> None:
        """Call gsrq_cuda_``name``."""
        if getattr(self._c, f"gsrq_cuda_{name}")(*arguments) != 0:
            raise self._error(name)

    def _error(self, name: str) -> GsrqError:
        return GsrqError(f"gsrq_cuda_{name}: {self._c.gsrq_cuda_error().decode()}")

    def check_device(self, device: torch.device) -> None:
        """Raises GsrqError where the library has no code that the GPU runs."""
        major, minor = torch.cuda.get_device_capability(device)
        have = [int(name.rstrip("af")) for name in self.architectures]
        # Machine code runs on its own generation; the last one is there as PTX, for every later GPU.
        native_code = any(a // 10 == major and a % 10 <= minor for a in have)
        if not native_code and 10 * major + minor < have[-1]:
            raise GsrqError(
                f"{self.path} was compiled for compute capabilities {', '.join(self.architectures)}, "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}",
                f"gsrq plugins build --cuda --cuda-arch {major}{minor}",
            )


@lru_cache(maxsize=1)
def load() -> CudaLibrary:
    """The library that native.find(native.CUDA) names.

    Raises:
        GsrqError: none is built, or it does not load.
    """
    found = native.find(native.CUDA)
    if found is None:
        raise GsrqError(
            "no library of CUDA kernels is built for this version",
            f"gsrq plugins build --cuda, or name one in {native.CUDA.variable}",
        )
    return CudaLibrary(found)

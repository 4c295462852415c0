"""The CUDA kernels in Python: the C interface, and torch operators on top of it (docs/cuda.md)."""

from gsrq_export.cuda.call import Call
from gsrq_export.cuda.check import CallTensors
from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.ops import attention, encode

__all__ = ["Call", "CallTensors", "CudaLayer", "attention", "encode"]

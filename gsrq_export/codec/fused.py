"""Where clustering runs on the CUDA kernels: on a GPU, once `gsrq plugins build --cuda` has made their library.

Elsewhere, and for wider sub-vectors than the kernels take, torch does it; both agree but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from gsrq_export import native

_ALLOWED: ContextVar[bool] = ContextVar("kernels allowed", default=True)


def available(device: torch.device, width: int) -> bool:
    """Whether the kernels serve vectors of ``width`` elements there.

    Raises:
        GsrqError: a library is there, but it does not load or has no code for this GPU.
    """
    if device.type != "cuda" or not _ALLOWED.get():
        return False
    from gsrq_export.cuda.cluster import MOST_WIDTH  # imports torch operators, which the CPU does not need

    return width <= MOST_WIDTH and _usable(device)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Within it nothing runs on the kernels: to measure torch's way, or to compare the two."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def library_hash(device: torch.device) -> str | None:
    """sha256 of the library that serves the device; None where torch does."""
    found = native.find(native.CUDA) if available(device, 1) else None
    return native.describe(found, native.CUDA).sha256 if found else None


@lru_cache(maxsize=16)
def _usable(device: torch.device) -> bool:
    if native.find(native.CUDA) is None:
        return False
    from gsrq_export.cuda.library import load

    load().check_device(device)
    return True


def nearest(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``cluster.nearest`` on the kernels."""
    from gsrq_export.cuda.cluster import assign

    found = assign(x[None], words[None])
    return found.codes[0].long(), found.gains[0]


def sum_rows(values: torch.Tensor, assignment: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """``cluster.sum_rows`` on the kernels."""
    from gsrq_export.cuda.cluster import update

    rows = values if values.ndim > 1 else values[:, None]
    codes = assignment.to(torch.uint8)[None]
    found = update(rows[None], codes, "sums", None if scale is None else scale[None]).words[0]
    return found if values.ndim > 1 else found[:, 0]


def encode(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Greedy codes: x float32 [N, D], words float32 [R, 256, D]; int64 [N, R]."""
    codes = []
    for stage in words:
        codes.append(nearest(x, stage)[0])
        x = x - stage[codes[-1]]
    return torch.stack(codes, 1)

"""Where a build calculates: --device of `gsrq build` and `gsrq tune`."""

from __future__ import annotations

import torch

from gsrq_export.codec import fused
from gsrq_export.errors import GsrqError

CPU = "cpu"


def check_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        GsrqError: no such device here, or a library of CUDA kernels that cannot serve it.
    """
    kind, colon, index = name.partition(":")
    if name == CPU:
        return torch.device(CPU)
    if kind != "cuda" or (colon and not (index.isascii() and index.isdigit())):
        raise GsrqError(f"--device {name!r} is no device", "use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        seen = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
        mend = f"use cuda:0 to cuda:{count - 1}, or cpu" if count else "use cpu, or install a driver and torch for CUDA"
        raise GsrqError(f"--device {name}: torch sees {seen}", mend)
    device = torch.device("cuda", int(index or 0))
    fused.available(device, 1)
    return device


def describe_device(name: str) -> dict[str, str]:
    """What a manifest says of it: the processor, and on a GPU what clusters, torch or the library of that sha256."""
    device = check_device(name)
    if device.type == CPU:
        return {"device": CPU}
    return {"device": torch.cuda.get_device_name(device), "clustering": fused.library_hash(device) or "torch"}

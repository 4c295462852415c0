"""The native library, built once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gsrq_export import native

ISAS = ["generic", "avx2", "avx512"]


@pytest.fixture(scope="session")
def library() -> Path:
    """The library of the current sources; the user's cache is used, as a user's build would be."""
    return native.ensure()


def machine_isas() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    avx2 = {"avx2", "fma", "f16c"} <= set(flags)
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= set(flags)
    return ISAS[: 1 + avx2 + avx512]


@pytest.fixture(params=machine_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set this machine has, forced."""
    monkeypatch.setenv("GSRQ_CPU_ISA", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

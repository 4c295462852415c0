"""Other people's bf16 decode attention: FlashInfer and torch's FlexAttention. Each is checked against float64 first.

A rival that is not installed, or does not run, is reported with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = 1e-2  # of the output's norm, bfloat16
WORKSPACE = 256 << 20  # bytes, as FlashInfer advises or more
Run = Callable[[], torch.Tensor]


def inputs(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, device: str) -> tuple[torch.Tensor, ...]:
    """query [B, heads, d], key and value [B, length, kv_heads, d], bfloat16."""
    generator = torch.Generator(device).manual_seed(length)
    shapes = ((batch, heads, head_dim), *[(batch, length, kv_heads, head_dim)] * 2)
    return tuple(torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes)


def float64_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: int) -> torch.Tensor:
    """Of one row: [heads, d]. Heads go one by one, as float64 copies are large."""
    kv_heads, head_dim = key.shape[2:]
    grouped = query[row].double().reshape(kv_heads, -1, head_dim)
    parts = []
    for n in range(kv_heads):
        score = grouped[n] @ key[row, :, n].double().T * head_dim**-0.5
        parts.append(score.softmax(-1) @ value[row, :, n].double())
    return torch.cat(parts)


def flashinfer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, page: int = 64) -> Run:
    """FlashInfer's batch decode on a paged cache, tensor cores on; keys and values lie in pages of their own order."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, length, kv_heads, head_dim = key.shape
    if length % page:
        raise ValueError(f"length {length} is no multiple of the page of {page} tokens")
    pages = length // page
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=key.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=key.device),
        torch.full((batch,), page, dtype=torch.int32),
        query.shape[1],
        kv_heads,
        head_dim,
        page,
        q_data_type=query.dtype,
        kv_data_type=key.dtype,
    )
    paged = tuple(x.reshape(batch * pages, page, kv_heads, head_dim) for x in (key, value))
    return lambda: wrapper.run(query, paged)


def flex_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Run:
    """torch.nn.attention.flex_attention, compiled: its decoding kernel splits the length."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled: Any = torch.compile(flex, dynamic=False)
    keys, values = (x.transpose(1, 2).contiguous() for x in (key, value))
    rows = query[:, :, None]
    return lambda: compiled(rows, keys, values, enable_gqa=True)[:, :, 0]


RIVALS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Run]] = {
    "FlashInfer": flashinfer,
    "FlexAttention": flex_attention,
}


def measure_rivals(
    shape: tuple[int, ...], milliseconds: Callable[[list[Callable[[], Any]]], float], device: str = "cuda"
) -> dict[str, dict[str, Any]]:
    """Of each rival {"ms", "relative_error"}, or {"absent": why}.

    Args:
        shape: batch, length, heads, kv_heads, head_dim.
        milliseconds: times a list of calls, which take turns.
    Raises:
        SystemExit: a rival's result is wrong; its time would mean nothing.
    """
    tensors = inputs(*shape, device)  # type: ignore[call-arg]
    row = shape[0] - 1
    expected = float64_output(*tensors, row)
    found: dict[str, dict[str, Any]] = {}
    for name, make in RIVALS.items():
        try:
            run = make(*tensors)
            got = run()[row].double()
            error = float((got - expected).norm() / expected.norm())
            if error < TOLERANCE:
                found[name] = {"ms": milliseconds([run, run]), "relative_error": error}
        except Exception as reason:  # whatever keeps another project's kernel from running is worth a line, no more
            found[name] = {"absent": f"{type(reason).__name__}: {str(reason).strip()[:300]}"}
            print(f"{name} does not run: {found[name]['absent'][:160]}", flush=True)
            continue
        if not error < TOLERANCE:
            raise SystemExit(f"{name}, {shape}: relative error {error:.2e}, allowed {TOLERANCE}")
    return found

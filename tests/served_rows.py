"""A pool of pages as servers share them, and calls of sequences in it: gsrq_export.hosting.rows by either way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attention_cases import Case, Data

from gsrq_export.cuda.layer import CudaLayer
from gsrq_export.cuda.rows import ExactPages, Rows, RowsCall

NAN = 127  # a byte of which floats are NaN


class Pool:
    """Pages in random order, each sequence's exact ones first; some belong to nobody."""

    def __init__(self, case: Case, layer: CudaLayer, seed: int = 0) -> None:
        rule, shape, device = case.config.rule, layer.shape, layer.shape.device
        self.case, self.layer = case, layer
        self.page = math.lcm(16, rule.block)
        sizes = [self.page * size for size in (shape.key_bytes, shape.value_bytes)]
        exact = 2 * case.kv_heads * rule.exact_slots * case.head_dim * case.exact_dtype.itemsize
        self.exact_pages = -(-exact // sum(sizes))
        coded = -(-max(rule.coded(case.steps), 1) // self.page)
        count = 3 + case.batch * (self.exact_pages + coded)
        self.parts = [torch.full((count, size), NAN, dtype=torch.int8, device=device) for size in sizes]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:-3]
        table = order.view(case.batch, -1).to(device, torch.int32)
        self.exact_table, self.table = (part.contiguous() for part in table.split([self.exact_pages, coded], 1))

    def exact(self) -> ExactPages:
        return ExactPages(*self.parts, self.exact_table, self.case.exact_dtype)

    def attend(self, run: Callable[..., None], tokens: tuple[torch.Tensor, ...], rows: Rows, out: torch.Tensor) -> None:
        """One call for all sequences, by gsrq_export.hosting.rows.attend_rows or another that takes the same."""
        codes = tuple(part.view(len(part), self.page, -1) for part in self.parts)
        run(self.layer, RowsCall(tokens, rows, codes, self.table, self.exact(), out))


def step_of(
    case: Case, data: Data, done: list[int], new: list[int], dtype: torch.dtype, device: str, spread: int
) -> tuple[tuple[torch.Tensor, ...], Rows, torch.Tensor]:
    """Tokens done .. done + new - 1 of each row, with gaps between rows and between tokens; an output of NaN.

    Args:
        spread: elements between a token and the next.
    """
    heads = (case.heads, case.kv_heads, case.kv_heads)
    starts, total = [], 1
    for count in new:
        starts.append(total)
        total += count + 1
    flat = torch.full((total, sum(heads) * case.head_dim + spread), 9.0, dtype=dtype)
    for row, (start, first, count) in enumerate(zip(starts, done, new, strict=True)):
        part = [x[row, :, first : first + count].transpose(0, 1) for x in (data.query, data.key, data.value)]
        flat[start : start + count, : flat.shape[1] - spread] = torch.cat(part, 1).flatten(1).to(dtype)
    flat = flat.to(device)
    widths = [n * case.head_dim for n in heads]
    tokens = tuple(x.unflatten(1, (-1, case.head_dim)) for x in flat[:, : sum(widths)].split(widths, 1))
    output = torch.full((total, widths[0] + spread), torch.nan, dtype=dtype, device=device)
    output = output[:, : widths[0]].unflatten(1, (case.heads, case.head_dim))
    numbers = (torch.tensor(given, device=device) for given in (new, done, starts))
    return tokens, Rows(*numbers, max(new)), output

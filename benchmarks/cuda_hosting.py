"""A layer's decode step as vLLM's and AutoDeploy's backends call it: tokens flattened and rotated, exact vectors paged.

The library's call (gsrq_cuda_attention_rows) beside the same made of torch operations around gsrq::attention, whose
bits it must have, and beside the operator alone. Eager times are of the clock, calls issued one after another; the
others are of CUDA graphs. Each call has its own layer and pages.

    python benchmarks/cuda_hosting.py --out benchmarks/results/cuda_hosting.json; python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_attention import DEVICE, HEAD_DIM, HEADS, KV_HEADS, PAGE, RULE, Setting, make_layer, milliseconds
from environment import environment

from gsrq_export.cache.reference import LayerCache
from gsrq_export.cuda import Call, CallTensors
from gsrq_export.cuda.rows import ExactPages, Rows, RowsCall, attention_rows
from gsrq_export.hosting.rows import attention_rows_plainly, read_exact, write_exact

SHAPES = [(1, 8192), (1, 131072), (16, 32768), (64, 8192)]
SETTINGS = [Setting(1, 128, 16, 16), Setting(1, 128, 24, 8, rotated=True)]
LAYERS = 4
Step = Callable[..., None]


class Hosted:
    """A layer, its pages and one new token a row."""

    def __init__(self, setting: Setting, batch: int, length: int, seed: int) -> None:
        self.layer = make_layer(setting, length, seed)
        shape, g = self.layer.shape, torch.Generator(DEVICE).manual_seed(seed)
        sizes = [PAGE * size for size in (shape.key_bytes, shape.value_bytes)]
        exact = -(-2 * KV_HEADS * RULE.exact_slots * HEAD_DIM * torch.bfloat16.itemsize // sum(sizes))
        coded = -(-RULE.coded(length) // PAGE)
        pages = batch * (exact + coded)
        keys, values = (
            torch.empty(pages, size, dtype=torch.int8, device=DEVICE).random_(-128, 128, generator=g) for size in sizes
        )
        table = torch.randperm(pages, generator=g, device=DEVICE).view(batch, -1).int()
        first, self.table = (part.contiguous() for part in table.split([exact, coded], 1))
        self.exact = ExactPages(keys, values, first, torch.bfloat16)
        vectors = (batch, KV_HEADS, RULE.exact_slots, HEAD_DIM)
        write_exact(self.exact, *(torch.randn(vectors, generator=g, device=DEVICE).bfloat16() for _ in range(2)))
        self.codes = keys.view(pages, PAGE, -1), values.view(pages, PAGE, -1)
        widths = [n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)]
        flat = torch.randn(batch, sum(widths), generator=g, device=DEVICE, dtype=torch.bfloat16)
        self.tokens = tuple(part.unflatten(1, (-1, HEAD_DIM)) for part in flat.split(widths, 1))
        one = torch.ones(batch, dtype=torch.int64, device=DEVICE)
        self.rows = Rows(one, one * (length - 1), torch.arange(batch, device=DEVICE), 1)
        self.output = torch.zeros(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        self.length = length

    def step(self, run: Step) -> None:
        run(self.layer, RowsCall(self.tokens, self.rows, self.codes, self.table, self.exact, self.output, self.length))

    def operator(self) -> Call:
        """The operator on the same pages, its exact vectors and tokens in place already."""
        q, k, v = (x[:, :, None].contiguous() for x in self.tokens)
        cache = LayerCache(*self.codes, *read_exact(self.layer.shape, self.exact, self.rows.past))
        tensors = CallTensors(q, k, v, self.rows.past, self.rows.new, *vars(cache).values(), self.table)
        return Call(self.layer, tensors, self.length)


def clock(calls: list[Callable[[], Any]], rounds: int = 8, repeats: int = 7) -> float:
    """Milliseconds of one call, issued one after another by Python: the longer of the GPU's time and the host's."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            for fn in calls:
                fn()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / (rounds * len(calls)) * 1e3)
    return statistics.median(times[2:])


def measure(setting: Setting, batch: int, length: int) -> dict[str, Any]:
    layers = [Hosted(setting, batch, length, seed) for seed in range(LAYERS)]
    outputs = []
    for run in (attention_rows_plainly, attention_rows):
        layers[0].output.fill_(torch.nan)
        layers[0].step(run)
        outputs.append(layers[0].output.clone())
    if not torch.isfinite(outputs[0]).all() or not torch.equal(*outputs):
        raise SystemExit(f"{setting.name}, {batch} x {length}: the library's bits are not those of torch")
    library, torch_calls = (
        [lambda x=x, run=run: x.step(run) for x in layers] for run in (attention_rows, attention_rows_plainly)
    )
    operators = [x.operator() for x in layers]
    row = {
        "setting": setting.name,
        "batch": batch,
        "length": length,
        "layers": LAYERS,
        "page": PAGE,
        "operator_ms": milliseconds([call.run for call in operators]),
        "library_graph_ms": milliseconds(library),
        "library_eager_ms": clock(library),
        "torch_graph_ms": milliseconds(torch_calls),
        "torch_eager_ms": clock(torch_calls),
    }
    row["library_graph_over_operator"] = row["library_graph_ms"] / row["operator_ms"]
    row["torch_over_library_eager"] = row["torch_eager_ms"] / row["library_eager_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "rows": []}
    for batch, length in SHAPES:
        for setting in SETTINGS:
            result["rows"].append(measure(setting, batch, length))
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in result["rows"][-1].items()}, flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

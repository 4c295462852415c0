"""Calibration of one LLaMA-3-8B-shaped layer on a GPU: encoding and GSKM training, torch against the CUDA kernels.

128 sequences of 2048 tokens, 8 KV heads of 128, D = 128, R = 16, 256 codewords: both ways in one run, on the same
vectors. Each step is checked (against float64, or one way against the other) before it is timed. Rooflines: torch's
own bfloat16, TF32 and float32 matrix products of the same run, and its device-to-device copy.

    python benchmarks/cuda_calibration.py --out benchmarks/results/cuda_calibration.json; python benchmarks/tables.py
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
from environment import environment

from gsrq_export.cache.reference import AttentionConfig
from gsrq_export.codec import fused
from gsrq_export.codec.cluster import nearest, sum_rows
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.refit import encode_rows
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.cuda import CudaLayer
from gsrq_export.cuda.cluster import assign, update

GROUPS, WIDTH, STAGES, WORDS = 8, 128, 16, 256
DEVICE = "cuda"
CLOSE = 4e-6  # of what the terms of a score add up to; see tests/gpu/test_cuda_cluster.py
CHECKED = 20_000  # rows compared with float64
DISTORTION = 0.01  # by which the two ways' distortion may differ, relatively


def sample(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [rows, 1024], clustered and of a decaying spectrum in a turned frame, and gradient weights [rows, 8]."""
    g = torch.Generator(DEVICE).manual_seed(0)
    spectrum = torch.arange(1, WIDTH + 1, device=DEVICE) ** -0.5
    parts = []
    for _ in range(GROUPS):
        turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g, device=DEVICE))[0]
        middle = torch.randn(512, WIDTH, generator=g, device=DEVICE) * spectrum
        which = torch.randint(512, (rows,), generator=g, device=DEVICE)
        x = (middle[which] + torch.randn(rows, WIDTH, generator=g, device=DEVICE) * spectrum) @ turn
        parts.append((4 * x).half())
    norms = torch.randn(rows, GROUPS, generator=g, device=DEVICE).exp()
    return torch.cat(parts, 1), gradient_weights(norms)


def milliseconds(step: Callable[[], Any], repeats: int) -> float:
    """The median over repeats, the first one left out."""
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def peak(step: Callable[[], Any]) -> int:
    """Bytes that a step needs beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def both(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], flop: float, repeats: int = 5
) -> dict[str, Any]:
    """Times and memory of the two ways. flop: of the distances alone, once."""

    def torchs() -> None:
        with fused.torch_alone():
            theirs()

    row = {
        "step": name,
        "flop": flop,
        "fused_ms": milliseconds(ours, repeats),
        "torch_ms": milliseconds(torchs, repeats),
        "fused_bytes": peak(ours),
        "torch_bytes": peak(torchs),
    }
    row["times_faster"] = row["torch_ms"] / row["fused_ms"]
    row["fused_tflops"], row["torch_tflops"] = (flop / row[f"{way}_ms"] / 1e9 for way in ("fused", "torch"))
    print(
        f"{name}: {row['fused_ms']:.2f} ms, torch {row['torch_ms']:.2f} ms ({row['times_faster']:.1f} times), "
        f"{row['fused_tflops']:.0f} TFLOP/s, memory {row['fused_bytes'] >> 20} and {row['torch_bytes'] >> 20} MiB",
        flush=True,
    )
    return row


def rooflines() -> dict[str, float]:
    """FLOP/s of torch's matrix products and bytes/s (read and written) of its copy."""
    n = 8192
    found = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"{name}_flops"] = 2 * n**3 / milliseconds(lambda a=a, b=b: a @ b, 5) * 1e3  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found["copy_bytes_a_second"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source), 5) * 1e3
    return found


def fail(what: str) -> None:
    raise SystemExit(f"not timed: {what}")


def check_steps(x: torch.Tensor, words: torch.Tensor, weights: torch.Tensor, norms: torch.Tensor) -> dict[str, float]:
    """The two steps against float64 on the first rows of each group."""
    x, weights, norms = (t[:, :CHECKED].contiguous() for t in (x, weights, norms))
    codes = assign(x, words, weights).codes
    fresh = update(x, codes, "means", weights).words
    unclear, worst = 0, 0.0
    for g in range(GROUPS):
        rows, book = x[g].double(), words[g].double()
        squares = (book**2).sum(1)
        scores = 2 * rows @ book.T - squares
        limit = CLOSE * (2 * rows.norm(dim=1) * book.norm(dim=1).amax() + squares.amax())
        two = scores.topk(2).values
        clear = two[:, 0] - two[:, 1] > limit
        unclear += int((~clear).sum())
        if not torch.equal(codes[g].long()[clear], scores.argmax(1)[clear]):
            fail("codes differ from float64's where it is no tie")
        means = torch.zeros(WORDS, WIDTH, dtype=torch.float64, device=DEVICE)
        means.index_add_(0, codes[g].long(), rows * weights[g].double()[:, None])
        total = torch.zeros(WORDS, dtype=torch.float64, device=DEVICE).index_add_(
            0, codes[g].long(), weights[g].double()
        )
        means /= total.clamp(min=1e-12)[:, None]
        worst = max(worst, float((fresh[g] - means).norm() / means.norm()))
    if not worst < 1e-5:
        fail(f"means differ from float64's by {worst:.1e}")
    return {"close_calls": unclear / (GROUPS * CHECKED), "means_relative_error": worst}


def step_rows(vectors: torch.Tensor, weights: torch.Tensor, rows: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    x = vectors.reshape(rows, GROUPS, WIDTH).transpose(0, 1).float().contiguous()
    w, norms = weights.T.contiguous(), x.norm(dim=2)
    words = x[:, :: rows // WORDS][:, :WORDS] * 0.8
    checks = check_steps(x, words, w, norms)
    codes = assign(x, words).codes
    index = codes.long()

    def torch_sums() -> None:
        for g in range(GROUPS):
            sum_rows(w[g], index[g])
            sum_rows(x[g], index[g], w[g])
            sum_rows(x[g], index[g], w[g] / norms[g].clamp(min=1e-12))

    flop = 2.0 * GROUPS * rows * WORDS * WIDTH
    found = [
        both("assign", lambda: assign(x, words, w), lambda: [nearest(x[g], words[g]) for g in range(GROUPS)], flop),
        both("update", lambda: update(x, codes, "gain-shape", w, norms, words), torch_sums, 0.0),
    ]
    found[1]["fused_read_bytes_a_second"] = 4 * x.numel() / found[1]["fused_ms"] * 1e3
    return found, checks


def train_row(vectors: torch.Tensor, weights: torch.Tensor, iterations: int) -> tuple[dict[str, Any], Codebook]:
    training = Training("gskm", iterations)
    rows = len(vectors)

    def run() -> tuple[Codebook, list[float], float, int]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        book, log = train_codebook(vectors, weights, WIDTH, STAGES, training)
        torch.cuda.synchronize()
        return book, log.held_out, time.perf_counter() - start, torch.cuda.max_memory_allocated() - before

    runs = [run() for _ in range(3)]
    if not all(torch.equal(runs[0][0].codewords, other[0].codewords) for other in runs[1:]):
        fail("two trainings gave different codewords")
    with fused.torch_alone():
        _, held_out, seconds, memory = run()
    off = abs(runs[0][1][-1] / held_out[-1] - 1)
    if not off < DISTORTION:
        fail(f"held-out distortion {runs[0][1][-1]:.5f}, torch {held_out[-1]:.5f}")
    ours = statistics.median(r[2] for r in runs[1:])
    trained = rows - rows // 16
    # Distances of every assignment: of the seeds, of each iteration and of the result; held-out rows once a stage.
    flop = 2.0 * GROUPS * STAGES * WORDS * WIDTH * (trained * (iterations + 2) + rows // 16)
    row = {
        "iterations": iterations,
        "fused_seconds": ours,
        "torch_seconds": seconds,
        "times_faster": seconds / ours,
        "flop": flop,
        "fused_tflops": flop / ours / 1e12,
        "torch_tflops": flop / seconds / 1e12,
        "fused_bytes": runs[0][3],
        "torch_bytes": memory,
        "fused_held_out": runs[0][1],
        "torch_held_out": held_out,
    }
    print(
        f"training: {ours:.2f} s, torch {seconds:.2f} s, held-out distortion {runs[0][1][-1]:.5f} and "
        f"{held_out[-1]:.5f}, memory {runs[0][3] >> 20} and {memory >> 20} MiB",
        flush=True,
    )
    return row, runs[0][0]


def encode_rows_of(book: Codebook, vectors: torch.Tensor) -> list[dict[str, Any]]:
    rows = len(vectors)
    flop = 2.0 * GROUPS * STAGES * rows * WORDS * WIDTH
    tables = torch.ones(2, 4, 0)
    layer = CudaLayer(GROUPS, WIDTH, book, book, *tables, AttentionConfig(1.0), DEVICE)
    if not torch.equal(layer.encode(vectors, "keys"), book.encode(vectors)):
        fail("the encoder's codes are not the reference's")
    exact = both("encode, exact", lambda: layer.encode(vectors, "keys"), lambda: book.encode(vectors), flop, 2)
    x = vectors.reshape(rows, GROUPS, WIDTH).transpose(0, 1).float().contiguous()
    words = book.codewords.float()

    def run() -> torch.Tensor:
        return torch.stack([encode_rows(x[g], words[g], 1) for g in range(GROUPS)])

    ours = run()
    with fused.torch_alone():
        agree = float((ours == run()).double().mean())
    if agree < 0.999:
        fail(f"{1 - agree:.1e} of the float32 codes differ from torch's")
    return [exact, {**both("encode, float32", run, run, flop, 3), "codes_equal": agree}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128 * 2048, help="calibration tokens")
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if not fused.available(torch.device(DEVICE, 0), WIDTH):
        raise SystemExit("no library of CUDA kernels: gsrq plugins build --cuda")
    vectors, weights = sample(args.rows)
    result: dict[str, Any] = {
        "environment": environment(),
        "shape": {"rows": args.rows, "groups": GROUPS, "width": WIDTH, "stages": STAGES, "codewords": WORDS},
        "rooflines": rooflines(),
    }
    print(result["environment"]["gpu"], {k: f"{v / 1e12:.2f} T" for k, v in result["rooflines"].items()}, flush=True)
    train_codebook(vectors[:8192], weights[:8192], WIDTH, 1, Training("gskm", 1))  # kernels load on first use

    def keep(name: str, value: Any) -> None:
        result[name] = value
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    steps, checks = step_rows(vectors, weights, args.rows)
    keep("steps", steps)
    keep("checks", checks)
    row, book = train_row(vectors, weights, args.iterations)
    keep("train", row)
    keep("encode", encode_rows_of(book, vectors))


if __name__ == "__main__":
    main()

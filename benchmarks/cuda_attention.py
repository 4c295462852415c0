"""Decode, coding and prefill of the CUDA kernels against the time that reading a bf16 cache takes, and against torch.

Each setting is checked against float64 before it is timed, and with its codes in pages against the linear cache.
Times are of CUDA graphs over several layers, each with its own codebooks and cache, so that neither stays in the L2
cache from call to call. Floors: the bytes of a bf16 (fp8) cache over the bandwidth of a device-to-device copy measured
in the same run.

    python benchmarks/cuda_attention.py --out benchmarks/results/cuda_attention.json; python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from decode_rivals import measure_rivals
from environment import environment

from gsrq_export import CacheRule, Codebook
from gsrq_export.cache.frame import rotate
from gsrq_export.cache.reference import AttentionConfig, LayerCache
from gsrq_export.cache.rule import to_token_order
from gsrq_export.cuda import Call, CallTensors, CudaLayer

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of LLaMA-3-8B
RULE = CacheRule(4, 64, 64)
SHAPES = [(1, 131072), (16, 32768), (64, 8192), (1, 1048576)]
PAGE = 64  # coded tokens a page, as docs/deploy-vllm.md has it
COLD = 256 * 2**20  # bytes of codes that a graph goes through, several times the L2 cache
TOLERANCE = 2e-3
DEVICE = "cuda"


@dataclass(frozen=True)
class Setting:
    """Nominal bits, width and stages of keys and values; int8: codewords on an int8 grid; rotated: the keys' frame."""

    bits: float
    width: int
    key_stages: int
    value_stages: int
    int8: bool = True
    rotated: bool = False

    @property
    def name(self) -> str:
        same = self.key_stages == self.value_stages
        stages = f"R {self.key_stages}" if same else f"R {self.key_stages} / {self.value_stages}"
        traits = ", rotated" * self.rotated + ", float16 codewords" * (not self.int8)
        return f"{self.bits:g} bit, D {self.width} {stages}{traits}"


SETTINGS = [
    Setting(1, 128, 16, 16),
    Setting(0.75, 128, 12, 12),
    Setting(0.375, 256, 12, 12),
    Setting(1, 128, 16, 16, int8=False),
    Setting(1, 128, 16, 16, rotated=True),
    Setting(1, 128, 24, 8, rotated=True),
    Setting(0.75, 128, 16, 8, rotated=True),
    Setting(0.375, 256, 16, 8, rotated=True),
]


@lru_cache(maxsize=64)
def codebook(setting: Setting, side: str, seed: int) -> Codebook:
    """Random codewords whose stages shrink as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    groups, stages = KV_HEADS * HEAD_DIM // setting.width, getattr(setting, f"{side}_stages")
    words = torch.randn(groups, stages, 256, setting.width, generator=generator)
    shrink = 0.85 ** torch.arange(stages)
    if setting.int8:
        words = (32 * words).round().clamp(-127, 127) * 2.0 ** (shrink.log2().round() - 6)[:, None, None]
    else:
        words *= 0.5 * shrink[:, None, None]
    center = torch.randn(KV_HEADS * HEAD_DIM, generator=generator) if setting.rotated and side == "key" else None
    return Codebook(words.half(), torch.eye(setting.width).expand(groups, -1, -1).contiguous(), center)


def make_layer(setting: Setting, positions: int, seed: int, exact_prefill: bool = False) -> CudaLayer:
    angle = torch.arange(positions, device=DEVICE).double()[:, None]
    angle = angle * 500000.0 ** (-torch.arange(64, device=DEVICE).double() / 64)
    config = AttentionConfig(HEAD_DIM**-0.5, RULE, exact_prefill=exact_prefill, codes_by_head=True)
    books = codebook(setting, "key", 2 * seed), codebook(setting, "value", 2 * seed + 1)
    return CudaLayer(HEADS, HEAD_DIM, *books, angle.cos().float(), angle.sin().float(), config, DEVICE)


def decode_call(layer: CudaLayer, batch: int, length: int, seed: int) -> Call:
    """One new token a row on a cache of random codes and exact vectors."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    cache = LayerCache.empty(
        batch, RULE.coded(length), KV_HEADS, HEAD_DIM, layer.keys, layer.values, RULE, torch.bfloat16, DEVICE
    )
    for codes in (cache.key_codes, cache.value_codes):
        codes.random_(-128, 128, generator=g)
    for exact in (cache.key_exact, cache.value_exact):
        exact.normal_(generator=g)
    q, k, v = (
        torch.randn(batch, n, 1, HEAD_DIM, generator=g, device=DEVICE, dtype=torch.bfloat16)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    past = torch.full((batch,), length - 1, dtype=torch.int64, device=DEVICE)
    return Call(layer, CallTensors(q, k, v, past, torch.ones_like(past), *vars(cache).values(), None))


def paged(call: Call, seed: int) -> Call:
    """The same with codes in pages of PAGE tokens, in random order."""
    batch, capacity = call.tensors.key_codes.shape[:2]
    pages = -(-capacity // PAGE)
    g = torch.Generator(DEVICE).manual_seed(seed)
    table = torch.randperm(batch * pages, generator=g, device=DEVICE).reshape(batch, pages).to(torch.int32)
    cut = []
    for codes in (call.tensors.key_codes, call.tensors.value_codes):
        whole = torch.nn.functional.pad(codes, (0, 0, 0, pages * PAGE - capacity))
        out = torch.empty_like(whole).view(batch * pages, PAGE, -1)
        out[table.flatten().long()] = whole.view(batch * pages, PAGE, -1)
        cut.append(out)
    return Call(call.layer, call.tensors._replace(key_codes=cut[0], value_codes=cut[1], block_table=table))


def float64_row(call: Call, row: int, step: int = 65536) -> torch.Tensor:
    """A row's attention in float64, [heads, head_dim]; keys and values are decoded piece by piece."""
    layer, t = call.layer, call.tensors
    n = int(t.past_lengths[row]) + 1
    coded = RULE.coded(n)
    position = torch.tensor([[n - 1]], device=DEVICE)
    q = rotate(t.query[row : row + 1].double(), layer.cos[position].double(), layer.sin[position].double(), False)
    q = q.reshape(KV_HEADS, -1, HEAD_DIM) * layer.config.scale
    exact = torch.cat([torch.arange(RULE.sinks), torch.arange(RULE.sinks + coded, n - 1)]).to(DEVICE)
    slot = RULE.slot(exact)

    def turned(token: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return rotate(keys[None], layer.cos[token][None].double(), layer.sin[token][None].double(), False)[0]

    pieces = [(turned(exact, t.key_exact[row][:, slot].double()), t.value_exact[row][:, slot].double())]
    key, value = (x[row].to(t.key_exact.dtype).double() for x in (t.key, t.value))
    pieces.append((turned(position[0], key), value))
    center = layer.keys.center
    codes = [
        to_token_order(stored[row], book.code_run(HEAD_DIM, layer.config.codes_by_head))
        for book, stored in ((layer.keys, t.key_codes), (layer.values, t.value_codes))
    ]
    for first in range(0, coded, step):
        token = torch.arange(first, min(first + step, coded), device=DEVICE)
        keys, values = (
            book.decode(rows[token]).double().reshape(-1, KV_HEADS, HEAD_DIM).transpose(0, 1)
            for book, rows in zip((layer.keys, layer.values), codes, strict=True)
        )
        if center is None:
            keys = turned(token + RULE.sinks, keys)
        else:
            mean = center.double().reshape(KV_HEADS, 1, HEAD_DIM).expand(-1, len(token), -1)
            keys = keys + turned(token + RULE.sinks, mean)
        pieces.append((keys, values))
    most = torch.full((KV_HEADS, q.shape[1], 1), float("-inf"), dtype=torch.float64, device=DEVICE)
    total = torch.zeros_like(most)
    out = torch.zeros_like(q)
    for keys, values in pieces:
        score = q @ keys.transpose(1, 2)
        peak = torch.maximum(most, score.amax(-1, keepdim=True))
        weight = (score - peak).exp()
        out = out * (most - peak).exp() + weight @ values
        total = total * (most - peak).exp() + weight.sum(-1, keepdim=True)
        most = peak
    return (out / total).reshape(HEADS, HEAD_DIM)


def milliseconds(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Of one call: the median over replays of a graph that goes through all of them, in turn."""
    for fn in calls:
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for fn in calls:
            fn()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    a = torch.empty(2 * 2**30, dtype=torch.uint8, device=DEVICE).random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds([lambda: b.copy_(a)] * 4) / 1e3)


def read_bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads."""
    a = torch.randn(2**30, device=DEVICE)
    return 4 * a.numel() / (milliseconds([lambda: a.sum()] * 4) / 1e3)


def sdpa(batch: int, length: int) -> dict[str, float]:
    """torch's attention of one bf16 token a row, the query heads of a KV head as rows of one head; ms a backend."""
    k, v = (torch.randn(batch, KV_HEADS, length, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name)):
                fn = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
                found[name] = milliseconds([fn, fn])
        except RuntimeError as error:
            print(f"{name} does not take this shape: {str(error).splitlines()[0][:80]}")
    return found


def decode_row(setting: Setting, batch: int, length: int, bandwidth: float, fastest_torch: float) -> dict[str, Any]:
    stages = setting.key_stages + setting.value_stages
    code_bytes = batch * length * (KV_HEADS * HEAD_DIM // setting.width) * stages
    sets = max(2, min(6, -(-COLD // code_bytes)))
    calls = [decode_call(make_layer(setting, length, i), batch, length, i) for i in range(sets)]
    expected = float64_row(calls[0], batch - 1)
    got = calls[0].run("attend")[batch - 1, 0].double()
    error = float((got - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise SystemExit(f"{setting.name}, {batch} x {length}: relative error {error:.2e}, allowed {TOLERANCE}")
    floor = batch * length * KV_HEADS * HEAD_DIM * 4 / bandwidth * 1e3
    in_pages = [paged(call, seed) for seed, call in enumerate(calls)]
    if not torch.equal(in_pages[0].run("attend"), calls[0].run("attend")):
        raise SystemExit(f"{setting.name}, {batch} x {length}: pages give other bits than a linear cache")
    attend, attend_pages = (
        milliseconds([lambda c=c: c.run("attend") for c in some])  # type: ignore[misc]
        for some in (calls, in_pages)
    )
    del in_pages
    row = {
        "setting": setting.name,
        **asdict(setting),
        "batch": batch,
        "length": length,
        "relative_error": error,
        "attend_ms": attend,
        "attend_pages_ms": attend_pages,
        "page": PAGE,
        "pages_over_linear": attend_pages / attend,
        "bf16_floor_ms": floor,
        "over_bf16_floor": attend / floor,
        "over_fp8_floor": 2 * attend / floor,
        "over_fastest_torch": attend / fastest_torch,
        "workspace_bytes": calls[0].workspace.numel(),
    }
    # The step in which a block of every row leaves the window, and is coded.
    full = RULE.sinks + RULE.window + RULE.block * ((length - 1 - RULE.sinks - RULE.window) // RULE.block) - 1
    for call in calls:
        call.tensors.past_lengths.fill_(full)
    row["encode_block_ms"] = milliseconds([lambda c=c: c.run("encode") for c in calls])  # type: ignore[misc]
    row["encode_share_of_a_step"] = row["encode_block_ms"] / RULE.block / attend
    return row


def prefill_row(setting: Setting, steps: int, exact: bool) -> dict[str, Any]:
    layer = make_layer(setting, steps, 0, exact)
    cache = LayerCache.empty(
        1, RULE.coded(steps), KV_HEADS, HEAD_DIM, layer.keys, layer.values, RULE, torch.bfloat16, DEVICE
    )
    q, k, v = (
        torch.randn(1, n, steps, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    call = Call(layer, CallTensors(q, k, v, zero, zero + steps, *vars(cache).values(), None))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        fn = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
        flash = milliseconds([fn])
    encode, attend = milliseconds([lambda: call.run("encode")]), milliseconds([lambda: call.run("attend")])
    return {
        "setting": setting.name,
        "steps": steps,
        "exact_prefill": exact,
        "encode_ms": encode,
        "attend_ms": attend,
        "torch_flash_ms": flash,
        "encode_over_flash": encode / flash,
        "attend_over_flash": attend / flash,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{n}" for b, n in SHAPES], help="as 16x32768")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--rivals-only", action="store_true", help="time FlashInfer, FlexAttention and torch alone")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "environment": environment(),
        "copy_bytes_a_second": bandwidth,
        "read_bytes_a_second": read_bandwidth(),
        "decode": [],
        "sdpa": [],
        "rivals": [],
        "prefill": [],
    }
    print(
        f"{result['environment']['gpu']}, copy {bandwidth / 1e12:.2f} TB/s, "
        f"read {result['read_bytes_a_second'] / 1e12:.2f} TB/s",
        flush=True,
    )

    def keep(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    for batch, length in (tuple(map(int, s.split("x"))) for s in args.shapes):
        floor = batch * length * KV_HEADS * HEAD_DIM * 4 / bandwidth * 1e3
        times = sdpa(batch, length)
        keep("sdpa", {"batch": batch, "length": length, "ms": times, "bf16_floor_ms": floor})
        print(
            f"{batch} x {length}: floor {floor:.3f} ms, torch { ({k: round(v, 3) for k, v in times.items()}) }",
            flush=True,
        )
        rivals = measure_rivals((batch, length, HEADS, KV_HEADS, HEAD_DIM), milliseconds)
        keep("rivals", {"batch": batch, "length": length, "found": rivals, "bf16_floor_ms": floor})
        print(f"  rivals: {rivals}", flush=True)
        torch.cuda.empty_cache()
        for setting in () if args.rivals_only else SETTINGS:
            row = decode_row(setting, batch, length, bandwidth, min(times.values()))
            keep("decode", row)
            print(
                f"  {setting.name:36s} {row['attend_ms']:.3f} ms (pages {row['attend_pages_ms']:.3f}), "
                f"{row['over_bf16_floor']:.2f} of the floor, "
                f"{row['over_fastest_torch']:.2f} of torch, error "
                f"{row['relative_error']:.1e}, coding {row['encode_block_ms']:.3f} ms a block "
                f"({100 * row['encode_share_of_a_step']:.1f} % a step)",
                flush=True,
            )
            torch.cuda.empty_cache()
    for steps in () if args.rivals_only else args.prefill:
        for exact in (True, False):
            row = prefill_row(SETTINGS[0], steps, exact)
            keep("prefill", row)
            print(f"prefill {steps}, {'exact' if exact else 'coded'}: {row}", flush=True)


if __name__ == "__main__":
    main()

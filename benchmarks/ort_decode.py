"""Decoding a LLaMA-3-8B-shaped model through onnxruntime-gpu: coded caches, of both key frames, against
GroupQueryAttention in float16.

Random weights and random cache contents: what is measured is speed and memory. Codes are ordered by head. Weights,
caches and logits lie on the GPU and are bound, the caches in place. Before anything is timed a step of each graph is
held to the same step in torch, and with a window that keeps all tokens exact the two graphs are held to each other.
A time is of one step of all rows at a length, waited for. For ours 1 of 64 steps codes a block: it is timed apart and
counted as 1 of 64. Memory is what the driver gives out in all, less what was given out before the weights.

    python benchmarks/ort_decode.py --out benchmarks/results/ort_decode.json --limit 500; python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from decoder_graph import (
    PARTS,
    PAST,
    Attention,
    Decoder,
    random_weights,
    reference_step,
    relative_error,
    write_decoder,
)
from environment import environment

from gsrq_export import CacheRule, Codebook, native
from gsrq_export.cache.reference import AttentionConfig, LayerCache, gsrq_attention, rotate
from gsrq_export.codec.codebook import LayerCodebooks

RULE = CacheRule(4, 64, 64)
WIDTH = 128
STAGES = {"gsrq": (16, 16), "rotated": (24, 8)}  # of keys and values: one bit an element
CONTEXTS = (8192, 32768, 131072)
LONGEST = 1 << 20
TOLERANCE = 2e-2  # of the logits' norm, float16 against float32 over all layers
SPARE = 2 << 30  # bytes left free when the largest batch is guessed
STEPS = 12
NAMES: dict[Attention, str] = {
    "gsrq": "coded, 1 bit",
    "rotated": "coded after RoPE, 1 bit",
    "gqa": "GroupQueryAttention",
}
TYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.int8: np.int8, torch.int64: np.int64}
TYPES |= {torch.int32: np.int32}


def codebooks(decoder: Decoder, attention: Attention) -> Callable[[int], LayerCodebooks]:
    """Random codewords on an int8 grid, of two kinds in turn; each layer holds its own copy."""

    def book(seed: int, stages: int, centered: bool) -> Codebook:
        generator = torch.Generator().manual_seed(seed)
        total = decoder.kv_heads * decoder.head_dim
        words = (32 * torch.randn(total // WIDTH, stages, 256, WIDTH, generator=generator)).round().clamp(-127, 127)
        words *= 2.0 ** ((0.85 ** torch.arange(stages)).log2().round() - 6)[:, None, None]
        center = torch.randn(total, generator=generator) if centered else None
        return Codebook(words.half(), torch.eye(WIDTH).expand(total // WIDTH, -1, -1).contiguous(), center)

    keys, values = STAGES[attention]
    rotated = attention == "rotated"
    kinds = [LayerCodebooks(book(2 * i, keys, rotated), book(2 * i + 1, values, False)) for i in range(2)]
    return lambda layer: kinds[layer % 2]


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


class Runner:
    """A session of one graph, with caches of one batch bound in place."""

    def __init__(
        self,
        directory: Path,
        decoder: Decoder,
        attention: Attention,
        weights: dict[str, torch.Tensor],
        positions: int,
        rule: CacheRule = RULE,
    ) -> None:
        self.decoder, self.attention, self.weights, self.rule = decoder, attention, weights, rule
        self.device, self.dtype = weights["embed"].device.type, weights["embed"].dtype
        self.config = AttentionConfig(decoder.head_dim**-0.5, rule, codes_by_head=True)
        self.codebooks = None if attention == "gqa" else codebooks(decoder, attention)
        path = write_decoder(
            directory, decoder, attention, self.dtype, positions, config=self.config, codebooks=self.codebooks
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        on_gpu = self.device == "cuda"
        if attention != "gqa":
            library = native.find(native.ORT_CUDA if on_gpu else native.ORT)
            if library is None:
                raise SystemExit("no library is built: gsrq plugins build" + (" --cuda" if on_gpu else ""))
            options.register_custom_ops_library(str(library))
        provider: Any = "CPUExecutionProvider"
        if on_gpu:
            provider = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
        self.session = ort.InferenceSession(str(path), options, providers=[provider])
        if on_gpu and "CUDAExecutionProvider" not in self.session.get_providers():
            raise SystemExit("the CUDA provider did not start; ONNX Runtime's log has the reason")
        self.rows = 0

    def row_bytes(self, length: int) -> int:
        """Of one row's cache with room for ``length`` tokens."""
        shapes = (self.shape(part, 1, length) for part in PAST[self.attention])
        size = torch.finfo(self.dtype).bits // 8
        each = (math.prod(s) * (1 if len(s) == 3 else size) for s in shapes)
        return self.decoder.layers * sum(each)

    def shape(self, part: str, batch: int, length: int) -> tuple[int, ...]:
        d = self.decoder
        if part.endswith("codes"):
            capacity = max(self.rule.coded(length), self.rule.block)  # whole blocks, as codes by head have to be
            stages = STAGES[self.attention][part.startswith("value")]
            return batch, capacity, d.kv_heads * d.head_dim // WIDTH * stages
        return batch, d.kv_heads, length if self.attention == "gqa" else self.rule.exact_slots, d.head_dim

    def allocate(self, batch: int, length: int, fill: bool = True) -> None:
        """Caches with room for ``length`` tokens a row; random, or zero."""
        d, generator = self.decoder, torch.Generator(self.device).manual_seed(batch)
        self.binding = self.session.io_binding()
        self.rows, self.length = batch, length
        self.cache: dict[str, torch.Tensor] = {}
        for i in range(d.layers):
            for part in PAST[self.attention]:
                dtype = torch.int8 if part.endswith("codes") else self.dtype
                tensor = torch.zeros(self.shape(part, batch, length), dtype=dtype, device=self.device)
                if fill and dtype == torch.int8:
                    tensor.random_(-128, 128, generator=generator)
                elif fill:
                    tensor.normal_(generator=generator)
                self.cache[f"{i}.{part}"] = tensor
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self.logits = torch.full((batch, 1, d.vocab), float("nan"), dtype=self.dtype, device=self.device)
        self._bind("input_ids", self.ids)
        self._bind("logits", self.logits, output=True)
        for name, tensor in self.weights.items():
            self._bind(name, tensor)
        for name, tensor in self.cache.items():
            self._bind(f"past.{name}", tensor)
            self._bind(f"present.{name}", tensor, output=True)
        if self.attention != "gqa":
            self.binding.bind_cpu_input("new_lengths", np.ones(batch, np.int64))
        else:
            self.seqlens = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self._bind("seqlens_k", self.seqlens)

    def _bind(self, name: str, tensor: torch.Tensor, output: bool = False) -> None:
        bind = self.binding.bind_output if output else self.binding.bind_input
        bind(name, self.device, 0, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())

    def at(self, past: int) -> None:
        """The next step has ``past`` tokens a row in the cache."""
        if self.attention != "gqa":
            self.binding.bind_cpu_input("past_lengths", np.full(self.rows, past, np.int64))
        else:
            self.seqlens.fill_(past)
            self.binding.bind_cpu_input("total_sequence_length", np.array([past + 1], np.int32))
        self._wait()

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def step(self, past: int, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocab] of one token a row."""
        self.ids.copy_(ids[:, None])
        self.at(past)
        self.run()
        self._wait()
        return self.logits[:, 0].clone()

    def milliseconds(self, past: int, repeats: int) -> float:
        """Median of a step on ``past`` tokens a row."""
        self.at(past)
        self.run()
        self.run()
        times = []
        for _ in range(repeats):
            self._wait()
            start = time.perf_counter()
            self.run()
            self._wait()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def layer_cache(self, layer: int, row: int) -> LayerCache:
        return LayerCache(*(self.cache[f"{layer}.{part}"][row : row + 1].clone() for part in PARTS))

    def reference(self, past: int, ids: torch.Tensor, row: int) -> torch.Tensor:
        """The row's logits of ``step`` in torch, from the caches as they are before it: float32 [vocab]."""
        d = self.decoder
        cos, sin = (t.to(self.device) for t in d.rope(past + 1))
        lengths = torch.tensor([past], device=self.device)

        def coded(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            assert self.codebooks is not None
            books = self.codebooks(i).to(self.device)
            one = torch.ones_like(lengths)
            cache = self.layer_cache(i, row)
            return gsrq_attention(q, k, v, cos, sin, lengths, one, cache, books.keys, books.values, self.config)[0]

        def grouped(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k = (rotate(x, cos[None, past:], sin[None, past:], False) for x in (q, k))
            old = [self.cache[f"{i}.{part}"][row : row + 1, :, :past].float() for part in PAST["gqa"]]
            keys, values = (torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True))
            score = q.reshape(1, d.kv_heads, -1, d.head_dim) @ keys.transpose(2, 3) * d.head_dim**-0.5
            return (score.softmax(-1) @ values).reshape(1, 1, d.heads, d.head_dim)

        attend = grouped if self.attention == "gqa" else coded
        return reference_step(d, self.weights, ids[row : row + 1, None], attend)[0, 0]


def check_step(runner: Runner, past: int, row: int = 0) -> float:
    """Relative error of the logits of a step on the caches as they are."""
    ids = torch.randint(runner.decoder.vocab, (runner.rows,), device=runner.device)
    expected = runner.reference(past, ids, row)
    error = relative_error(runner.step(past, ids)[row], expected)
    if not error < TOLERANCE:
        raise SystemExit(f"{NAMES[runner.attention]}, {past} tokens: logits {error:.2e} off, allowed {TOLERANCE}")
    return error


def check_graphs_agree(decoder: Decoder, device: str, dtype: torch.dtype, steps: int = 24) -> float:
    """The graphs decode the same tokens from nothing, with a window that keeps all exact; returns the worst error."""
    weights = random_weights(decoder, dtype, device, 1)
    with tempfile.TemporaryDirectory() as temporary:
        found = []
        tokens = torch.randint(decoder.vocab, (steps, 2), generator=torch.Generator().manual_seed(2)).to(device)
        for attention in NAMES:
            directory = Path(temporary) / attention
            directory.mkdir()
            rule = CacheRule(4, 64, 64)
            runner = Runner(directory, decoder, attention, weights, 64, rule)
            runner.allocate(2, 64, fill=False)
            found.append([runner.step(past, tokens[past]) for past in range(steps)])
        errors = [relative_error(*pair) for one in found[:-1] for pair in zip(one, found[-1], strict=True)]
    if not all(error < TOLERANCE for error in errors):  # NaN, which max may pass over, is refused
        raise SystemExit(f"the graphs differ by {max(errors):.2e} of the logits' norm, allowed {TOLERANCE}")
    return max(errors)


def measure(runner: Runner, batch: int, length: int, before: int) -> dict[str, Any]:
    """Time and memory of a batch, allocated already; frees nothing."""
    plain = runner.milliseconds(length - 2, STEPS)
    row: dict[str, Any] = {"batch": batch, "step_ms": plain, "coding_step_ms": None}
    mean = plain
    if runner.attention != "gqa":
        # The token that completes a block, at most 64 tokens earlier.
        full = RULE.sinks + RULE.window + RULE.coded(length - 1) - 1
        row["coding_step_ms"] = runner.milliseconds(full, 3)
        mean = (plain * (RULE.block - 1) + row["coding_step_ms"]) / RULE.block
    if not bool(torch.isfinite(runner.logits).all()):
        raise SystemExit(f"{NAMES[runner.attention]}, {batch} x {length}: logits are not finite")
    return row | {
        "mean_step_ms": mean,
        "tokens_a_second": 1e3 * batch / mean,
        "cache_bytes": batch * runner.row_bytes(length),
        "memory_bytes": used_bytes() - before,
    }


def free(runner: Runner) -> None:
    del runner.binding, runner.cache, runner.logits
    gc.collect()
    torch.cuda.empty_cache()


def largest(runner: Runner, length: int, before: int, most: int) -> dict[str, Any]:
    """The largest batch that decodes, found from the free memory and lowered where it does not fit."""
    available = torch.cuda.mem_get_info()[0] - SPARE
    batch = min(most, available // (runner.row_bytes(length) + 2 * runner.decoder.vocab))
    for _ in range(6):
        if batch < 1:
            break
        try:
            runner.allocate(batch, length)
            return measure(runner, batch, length, before)
        except (RuntimeError, ort.capi.onnxruntime_pybind11_state.Fail) as error:  # out of memory, torch's or ORT's
            if "memory" not in str(error).lower():
                raise
            print(f"  {batch} rows do not fit: {str(error).splitlines()[0][:100]}", flush=True)
        batch = batch * 9 // 10
        free(runner)
    return {"batch": 0}


def measure_context(
    decoder: Decoder,
    attention: Attention,
    weights: dict[str, torch.Tensor],
    length: int,
    before: int,
    most: int,
    checked: bool,
) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(Path(temporary), decoder, attention, weights, length)
        runner.allocate(1, length)
        error = check_step(runner, length - 2) if checked else None
        torch.cuda.empty_cache()  # what the check took is not of the model
        rows.append({"relative_error": error} | measure(runner, 1, length, before))
        free(runner)
        if most > 1:
            rows.append({"relative_error": None} | largest(runner, length, before, most))
            free(runner)
        del runner
    gc.collect()
    torch.cuda.empty_cache()
    row_of = {"attention": attention, "length": length}
    if attention != "gqa":
        row_of["code_order"] = "head"
    return [row_of | {"largest": i == 1} | row for i, row in enumerate(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[*CONTEXTS, LONGEST])
    parser.add_argument("--layers", type=int, default=Decoder.layers)
    parser.add_argument("--kinds", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--most", type=int, default=2048, help="rows at most")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no measurement is begun")
    arguments = parser.parse_args()
    start = time.monotonic()
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in ort.get_available_providers():
        raise SystemExit("needs a GPU and onnxruntime-gpu")
    ort.preload_dlls()
    torch.backends.cuda.matmul.allow_tf32 = False
    small = Decoder(layers=2, hidden=512, heads=8, kv_heads=2, mlp=1024, vocab=1000)
    agreement = check_graphs_agree(small, "cuda", torch.float16)
    print(f"graphs agree within {agreement:.1e}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    decoder = Decoder(layers=arguments.layers)
    before = used_bytes()
    weights = random_weights(decoder, torch.float16, "cuda")
    result: dict[str, Any] = {
        "environment": environment() | {"onnxruntime": ort.__version__},
        "decoder": asdict(decoder),
        "weights_bytes": sum(t.numel() * t.element_size() for t in weights.values()),
        "gpu_bytes": torch.cuda.mem_get_info()[1],
        "rule": asdict(RULE),
        "codec": {"width": WIDTH, "stages": STAGES, "bits": 1},
        "note": "random weights, all distinct in memory; codebooks of two kinds, copied for each layer; random caches; "
        "no sampling; one process, no CUDA graphs on either side",
        "graphs_agree_within": agreement,
        "tolerance": TOLERANCE,
        "most_rows_tried": arguments.most,
        "rows": [],
        "left_out": [],
    }
    for length in arguments.contexts:
        for attention in arguments.kinds:
            label = f"{NAMES[attention]}, {length}"
            if time.monotonic() - start > arguments.limit:
                result["left_out"].append({"attention": attention, "length": length, "why": "time limit"})
                continue
            most = arguments.most if length < LONGEST else 1
            try:
                # The step in torch takes float32 keys and values of all tokens: not for the longest.
                rows = measure_context(decoder, attention, weights, length, before, most, length < LONGEST)
            except (RuntimeError, ort.capi.onnxruntime_pybind11_state.Fail) as error:
                if "memory" not in str(error).lower():
                    raise
                rows = []
                result["left_out"].append({"attention": attention, "length": length, "why": str(error)[:300]})
                gc.collect()
                torch.cuda.empty_cache()
            result["rows"] += rows
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            for row in rows:
                print(f"{label}: { ({k: v for k, v in row.items() if k not in ('attention', 'length')}) }", flush=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

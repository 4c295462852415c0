"""How fast does the CPU op decode one token, against onnxruntime's own GroupQueryAttention in float32?

Per attention layer, one new token, batch 1, the cache in place through IO binding on both sides. Each output is first
checked against a plain reference. Then all are timed in turn, in short blocks; medians are compared. Ours is timed in
both orders of stored codes (cache.code_order), a row each, on the same cache in either order; where a token has one
sub-vector the orders are the same bytes. A row of the rotated frame (codec.key_frame: rotated) has one more side in the
same turns: the same shape and order with keys coded before RoPE.
Usage: python benchmarks/cpu_decode.py [--repeats 30] [--threads 2] [--only PART-OF-A-NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper

from gsrq_export import native
from gsrq_export.cache.frame import rotate
from gsrq_export.cache.reference import AttentionConfig, LayerCache, attributes, gsrq_attention
from gsrq_export.cache.rule import CacheRule, from_token_order
from gsrq_export.codec.codebook import Codebook

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_decode.json"
RULE = CacheRule(4, 64, 64)
CONTEXTS = (4096, 32768)
PAUSE = 0.01  # seconds between the sides
BLOCK = 4  # runs of one side before the other has its turn; one more is run and dropped
TOLERANCE = 2e-4
CACHE = ("key_codes", "value_codes", "key_exact", "value_exact")
ORDERS = {"head": True, "token": False}  # cache.code_order, and whether codes lie by head


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    stages: int
    rotated: bool = False


SHAPES = (
    Shape("llama-3-8b D128 R16", 32, 8, 128, 128, 16),
    Shape("recall-28m D256 R32", 8, 2, 128, 256, 32),
    Shape("recall-28m D128 R16", 8, 2, 128, 128, 16),
    Shape("llama-3-8b D128 R16, rotated keys", 32, 8, 128, 128, 16, rotated=True),
    Shape("recall-28m D256 R32, rotated keys", 8, 2, 128, 256, 32, rotated=True),
)


@dataclass(frozen=True)
class Row:
    """One shape at one context in one order; times are medians in ms, ratios are GroupQueryAttention over ours."""

    shape: str
    tokens: int
    gsrq_ms: float
    gsrq_quartiles_ms: tuple[float, float]
    gqa_ms: float
    gqa_quartiles_ms: tuple[float, float]
    speed_ratio: float
    block_encode_ms: float
    block_encode_share: float
    gsrq_cache_bytes: int
    fp32_cache_bytes: int
    cache_ratio: float
    codebook_bytes: int
    prepared_key_bytes: int
    max_error: float
    gqa_max_error: float
    rotated: bool
    pre_rope_ms: float | None  # of a rotated row: the same shape and order with keys coded before RoPE
    code_order: str


def codebook(shape: Shape, seed: int) -> Codebook:
    """Random codewords that shrink over the stages; speed does not depend on their values."""
    generator = torch.Generator().manual_seed(seed)
    groups = shape.kv_heads * shape.head_dim // shape.width
    words = torch.randn(groups, shape.stages, 256, shape.width, generator=generator) * 0.5
    words *= 0.9 ** torch.arange(shape.stages)[None, :, None, None]
    return Codebook(words.half(), torch.eye(shape.width).repeat(groups, 1, 1))


def to_ort(tensor: torch.Tensor) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def new_session(model: onnx.ModelProto, threads: int, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads of one side would spin on the other's cores; both sides stop theirs after each run.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_model(
    node: onnx.NodeProto, tensors: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> onnx.ModelProto:
    def constant(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        kind = helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype)
        return helper.make_tensor(name, kind, list(tensor.shape), tensor.numpy().tobytes(), raw=True)

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(t.numpy().dtype), list(t.shape))
        for name, t in tensors.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "layer", inputs, outputs, [constant(n, t) for n, t in constants.items()])
    for output in graph.output:
        source = output.name.replace("present_", "past_" if node.op_type == "GroupQueryAttention" else "")
        kind = tensors[source].numpy().dtype if source in tensors else np.dtype(np.float32)
        output.CopyFrom(helper.make_tensor_value_info(output.name, helper.np_dtype_to_tensor_dtype(kind), None))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.gsrq", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Side:
    """A bound session: run() is one decode step that updates the cache in place."""

    def __init__(
        self, session: ort.InferenceSession, tensors: dict[str, torch.Tensor], aliases: dict[str, str]
    ) -> None:
        self.session, self.binding = session, session.io_binding()
        self.values = {name: to_ort(tensor) for name, tensor in tensors.items()}
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_output("output")
        for output, source in aliases.items():
            self.binding.bind_ortvalue_output(output, self.values[source])

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def set(self, name: str, tensor: torch.Tensor) -> None:
        self.values[name] = to_ort(tensor)
        self.binding.bind_ortvalue_input(name, self.values[name])

    def output(self) -> torch.Tensor:
        return torch.from_numpy(self.binding.get_outputs()[0].numpy().copy())

    def times(self, runs: int) -> list[float]:
        self.run()
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            self.run()
            times.append((time.perf_counter() - start) * 1e3)
        return times


def measure(shape: Shape, tokens: int, library: Path, threads: int, repeats: int) -> list[Row]:
    """A row an order of codes."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    heads, kv, d = shape.heads, shape.kv_heads, shape.head_dim
    keys, values = codebook(shape, 1), codebook(shape, 2)
    plain = keys
    if shape.rotated:
        keys = replace(keys, center=randn(kv * d))
    angle = torch.arange(tokens + 64)[:, None] * 500000.0 ** -(torch.arange(d // 2) / (d // 2))
    cos, sin = angle.cos(), angle.sin()
    query, key, value = randn(1, heads, 1, d), randn(1, kv, 1, d), randn(1, kv, 1, d)
    capacity = RULE.coded(tokens) + RULE.block

    def codes(book: Codebook) -> torch.Tensor:
        return torch.randint(-128, 128, (1, capacity, book.code_bytes), dtype=torch.int8, generator=generator)

    exact = (1, kv, RULE.exact_slots, d)
    cache = LayerCache(codes(keys), codes(values), randn(*exact).half(), randn(*exact).half())
    past = torch.tensor([tokens - 1])
    tensors = {"query": query, "key": key, "value": value, "cos": cos, "sin": sin}
    tensors |= {"past_lengths": past, "new_lengths": torch.tensor([1])}
    books = {"key_codebooks": keys.codewords, "value_codebooks": values.codewords}
    books |= {"key_transform": keys.transform, "value_transform": values.transform}
    config = AttentionConfig(d**-0.5, RULE)
    outputs = ["output", *(f"present_{name}" for name in CACHE)]

    def sides(book: Codebook) -> tuple[dict[str, Side], dict[str, float]]:
        """The operator with these keys' codebook by order of codes, and how far each output is off the reference."""
        constants = books if book.center is None else {**books, "key_center": book.center}
        want, _ = gsrq_attention(query, key, value, cos, sin, past, torch.tensor([1]), cache, book, values, config)
        made, errors = {}, {}
        for order, by_head in ORDERS.items():
            # Each side reads codes of its own: a bound tensor is not copied.
            stored = {name: getattr(cache, name).clone() for name in CACHE}
            for name, of in (("key_codes", keys), ("value_codes", values)):
                stored[name] = from_token_order(stored[name], of.code_run(d, by_head))
            given = attributes(replace(config, codes_by_head=by_head), book.center is not None)
            inputs = tensors | stored
            node = helper.make_node("GsrqAttention", [*inputs, *constants], outputs, domain="ai.gsrq", **given)
            session = new_session(make_model(node, inputs, constants), threads, library)
            made[order] = Side(session, inputs, {f"present_{name}": name for name in CACHE})
            made[order].run()
            errors[order] = float((made[order].output() - want).abs().max())
        return made, errors

    ours, error = sides(keys)
    before, before_error = sides(plain) if shape.rotated else ({}, {})

    full_keys, full_values = randn(1, kv, tokens, d), randn(1, kv, tokens, d)
    full = {"query": query.reshape(1, 1, -1), "key": key.reshape(1, 1, -1), "value": value.reshape(1, 1, -1)}
    full |= {"past_key": full_keys, "past_value": full_values}
    full |= {"seqlens_k": torch.tensor([tokens - 1], dtype=torch.int32)}
    full |= {"total_sequence_length": torch.tensor([tokens], dtype=torch.int32), "cos": cos, "sin": sin}
    sizes = {"num_heads": heads, "kv_num_heads": kv, "do_rotary": 1}
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", [*full], outputs, domain="com.microsoft", **sizes)
    aliases = {"present_key": "past_key", "present_value": "past_value"}
    theirs = Side(new_session(make_model(node, full, {}), threads), full, aliases)
    theirs.run()
    turned = [rotate(x, cos[tokens - 1][None, None], sin[tokens - 1][None, None], False) for x in (query, key)]
    full_keys, full_values = full_keys.clone(), full_values.clone()
    full_keys[:, :, -1:], full_values[:, :, -1:] = turned[1], value
    grouped = turned[0].reshape(1, kv, heads // kv, d)
    weight = (grouped @ full_keys.transpose(2, 3) * d**-0.5).softmax(-1)
    gqa_error = float((theirs.output().flatten() - (weight @ full_values).flatten()).abs().max())
    found = [
        *(("ai.gsrq", off) for off in (*error.values(), *before_error.values())),
        ("GroupQueryAttention", gqa_error),
    ]
    for name, off in found:
        if not off < TOLERANCE:
            raise SystemExit(f"{shape.name}, {tokens} tokens: {name} is {off} off its reference")

    turns = [
        *((ours[order], order) for order in ours),
        (theirs, "gqa"),
        *((before[o], f"pre-rope {o}") for o in before),
    ]
    times: dict[str, list[float]] = {name: [] for _, name in turns}
    for _ in range(repeats):
        for one, name in turns:
            times[name] += one.times(BLOCK)
            time.sleep(PAUSE)

    def coding_ms(one: Side) -> float:
        """A step that codes a block of 64 tokens, less one that does not; both at the end of the context."""
        encode = []
        at = RULE.coded(tokens) + RULE.sinks + RULE.window + RULE.block
        for _ in range(5):
            one.set("past_lengths", torch.tensor([at - 1]))
            with_block = float(np.median(one.times(3)))
            one.set("past_lengths", torch.tensor([at - 2]))
            encode.append(with_block - float(np.median(one.times(3))))
        return max(0.0, float(np.median(encode)))

    gqa_ms = float(np.median(times["gqa"]))
    exact_bytes = 2 * kv * RULE.exact_slots * d * 2
    used = RULE.coded(tokens) * (keys.code_bytes + values.code_bytes) + exact_bytes
    fp32 = 2 * kv * tokens * d * 4

    def quartiles(times: list[float]) -> tuple[float, float]:
        return float(np.quantile(times, 0.25)), float(np.quantile(times, 0.75))

    rows = []
    for order in ORDERS:
        gsrq_ms, block_ms = float(np.median(times[order])), coding_ms(ours[order])
        row = Row(
            shape.name,
            tokens,
            gsrq_ms,
            quartiles(times[order]),
            gqa_ms,
            quartiles(times["gqa"]),
            gqa_ms / gsrq_ms,
            block_ms,
            block_ms / (RULE.block * gsrq_ms),
            used,
            fp32,
            fp32 / used,
            keys.stored_bytes + values.stored_bytes,
            keys.codewords.numel() * 2,
            error[order],
            gqa_error,
            shape.rotated,
            float(np.median(times[f"pre-rope {order}"])) if before else None,
            order,
        )
        rows.append(row)
    return rows


def environment(library: Path, threads: int) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    described = native.describe(library)
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        ),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_sets_built": described.instruction_sets,
        "instruction_set_forced": os.environ.get("GSRQ_CPU_ISA", "none: the best the processor has"),
        "library_sha256": described.sha256,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_1min_at_start": os.getloadavg()[0],
        "rule": asdict(RULE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help=f"blocks of {BLOCK} runs a side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="shapes whose names have this part; other rows stay in the file")
    arguments = parser.parse_args()
    library = native.ensure()
    report: dict[str, object] = {"environment": environment(library, arguments.threads)}
    rows = []
    print(
        f"{'shape':34} {'tokens':>6} {'codes by':>8} {'ours ms':>8} {'GQA ms':>8} {'speed':>6} {'cache':>6} "
        f"{'encode':>7} {'error':>8}"
    )
    kept = []
    if arguments.only:
        kept = [row for row in json.loads(RESULTS.read_text())["rows"] if arguments.only not in row["shape"]]
    for shape in (shape for shape in SHAPES if arguments.only in shape.name):
        for tokens in CONTEXTS:
            for row in measure(shape, tokens, library, arguments.threads, arguments.repeats):
                rows.append(row)
                print(
                    f"{row.shape:34} {row.tokens:6} {row.code_order:>8} {row.gsrq_ms:8.3f} {row.gqa_ms:8.3f} "
                    f"{row.speed_ratio:5.2f}x {row.cache_ratio:5.1f}x {row.block_encode_share:6.1%} "
                    f"{row.max_error:8.1e}   quartiles {row.gsrq_quartiles_ms[0]:.2f}-{row.gsrq_quartiles_ms[1]:.2f} / "
                    f"{row.gqa_quartiles_ms[0]:.2f}-{row.gqa_quartiles_ms[1]:.2f} ms, "
                    f"codebooks {row.codebook_bytes / 2**20:.1f} MiB + {row.prepared_key_bytes / 2**20:.1f} prepared"
                    + (f", keys before RoPE {row.pre_rope_ms:.3f} ms" if row.pre_rope_ms else ""),
                    flush=True,
                )
    report["load_average_1min_at_end"] = os.getloadavg()[0]
    report["rows"] = [*kept, *(asdict(row) for row in rows)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()

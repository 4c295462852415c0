"""What every cache quantizer costs in perplexity and recall, at its honest bits, in one harness.

    python benchmarks/baselines.py --model DIR --calibration TEXT --evaluation novels=TEXT [--evaluation wiki=TEXT ...]

All methods get the same calibration vectors (recall passages in every other sequence), the same sinks, window and
block, and the same evaluation texts, which must not be the calibration's. Writes JSON after each row; rows that are
there already are not run again, so a run that was cut short goes on, and --methods picks rows by their labels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment
from quality import brief, judge, sequences

from gsrq_export.baselines.attention import baseline
from gsrq_export.baselines.base import LayerCodecs, Method, effective_bits
from gsrq_export.baselines.calibrate import fit_model
from gsrq_export.baselines.methods import methods
from gsrq_export.cache.rule import CacheRule
from gsrq_export.capture import Captured, CaptureSettings, capture
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.model.introspect import ModelSpec, inspect_model
from gsrq_export.model.loading import load_model

CONTEXTS = (2048, 8192, 131072)
GRADIENT_WIDTH = 4  # norms are taken of the narrowest parts any method weighs: four channels, CQ at 2 bits


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", action="append", required=True, help="name=file; recall uses the first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/baselines.json")
    parser.add_argument("--methods", nargs="+", default=[""], help="parts of labels; default: all")
    parser.add_argument("--list", action="store_true", help="print the labels and stop")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--tokens-window", type=int, default=64, help="W of the cache rule")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--prefill", choices=["coded", "exact"], default="coded")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=2048, help="tokens of a perplexity window")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300, help="start no row after this time")
    return parser.parse_args()


def identity(method: Method) -> dict[str, Any]:
    return {"method": type(method).__name__, **asdict(method)}  # type: ignore[call-overload]


def bits(spec: ModelSpec, codecs: list[LayerCodecs], rule: CacheRule) -> dict[str, Any]:
    """Nominal (codes, scales and norms of a coded token, keys and values averaged) and effective."""
    shapes = [(layer.num_kv_heads, layer.head_dim) for layer in spec.layers]
    weight = sum(heads * dim for heads, dim in shapes)
    nominal = sum(
        heads * dim * (pair.keys.bits_per_element(heads, dim) + pair.values.bits_per_element(heads, dim)) / 2
        for (heads, dim), pair in zip(shapes, codecs, strict=True)
    )
    effective = {str(n): effective_bits(spec, codecs, rule, n) for n in CONTEXTS}
    return {"nominal_bits": nominal / weight, "effective_bits": effective}


def fits(method: Method, spec: ModelSpec) -> bool:
    """Whether the method's sub-vectors divide the heads of this model."""
    width = getattr(method, "width", 1)
    return all(layer.num_kv_heads * layer.head_dim % width == 0 for layer in spec.layers)


def main() -> None:
    args = options()
    chosen = [m for m in methods() if any(part.lower() in m.label.lower() for part in args.methods)]
    if args.list or not chosen:
        print("\n".join(m.label for m in methods()))
        sys.exit(0 if args.list else f"no method's label has {' or '.join(args.methods)} in it")
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rule = CacheRule(args.sinks, args.tokens_window, args.block)
    texts = {name: Path(file).read_text() for name, file in (e.split("=", 1) for e in args.evaluation)}
    calibration = args.calibration.read_text()
    model, tokenizer = load_model(args.model, device)
    spec = inspect_model(model, model.config.max_position_embeddings)

    # Rows of one file must be comparable: what they depend on is kept beside them and held equal.
    protocol = {
        "rule": asdict(rule),
        "prefill": args.prefill,
        "calibration": [args.sequences, args.length],
        "perplexity": [args.windows, args.window],
        "recall": [args.cases, *args.lengths],
        "model": args.model.resolve().name,
        "evaluation": {name: len(text) for name, text in texts.items()},
    }
    results = json.loads(args.out.read_text()) if args.out.exists() else {"protocol": protocol, "rows": []}
    if results.get("protocol") != protocol:
        sys.exit(f"{args.out} was made with other options ({results.get('protocol')}); name another --out")

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        results["environment"] = environment()
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(args.out)

    def note(*words: object) -> None:
        print(*words, f"{time.monotonic() - begin:.0f} s", flush=True)

    runner = TorchRunner(model, args.prefill == "exact")
    if "exact" not in results:
        results["exact"] = judge(TorchRunner(model), tokenizer, texts, args)
        save()
        note("exact:", brief(results["exact"]))
    done = [row["setting"] for row in results["rows"]]
    todo = [m for m in chosen if identity(m) not in done]
    if not todo:
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = sequences(calibration, tokenizer, args.sequences, args.length, 0.5)
        capture(model, spec, ids, CaptureSettings(GRADIENT_WIDTH, GRADIENT_WIDTH, batch=args.batch), Path(folder))
        note("captured")
        for method in todo:
            if time.monotonic() - begin > args.seconds:
                note("out of time before", method.label)
                break
            if not fits(method, spec):
                note(method.label, "does not fit this model's heads")
                continue
            start = time.monotonic()
            try:
                codecs = fit_model(Captured(Path(folder)), spec, method, args.length, device)
            except GsrqError as error:
                note(method.label, "cannot be fitted:", error.problem)
                continue
            trained = time.monotonic() - start
            with baseline(model, codecs, rule, exact_prefill=args.prefill == "exact", spec=spec):
                found = judge(runner, tokenizer, texts, args)
            seconds = {"fit": round(trained, 1), "judge": round(time.monotonic() - start - trained, 1)}
            row = {"label": method.label, "setting": identity(method), **bits(spec, codecs, rule), "seconds": seconds}
            results["rows"].append({**row, **found})
            save()
            effective = row["effective_bits"][str(CONTEXTS[1])]
            note(f"{method.label}: {row['nominal_bits']:.3f} bits, {effective:.2f} at {CONTEXTS[1]},", brief(found))


if __name__ == "__main__":
    main()

"""What a coded cache costs in perplexity and recall, by bits and by what it was calibrated on.

    python benchmarks/quality.py --model DIR --calibration TEXT --evaluation novels=TEXT [--evaluation wiki=TEXT ...]

Calibrates once on the text as it is ("generic") and once with recall passages planted in every other sequence
("traffic-like"), trains each setting's codebooks and evaluates the torch reference on the evaluation texts, which
must not be the calibration's. Writes JSON after each setting; settings in the JSON already are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, environment

from gsrq_export.cache.footprint import count
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import coded
from gsrq_export.capture import KINDS, Captured, CaptureSettings, attention_metric, capture, output_projections
from gsrq_export.codec.cluster import Method
from gsrq_export.codec.codebook import LayerCodebooks
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.evaluate.perplexity import perplexity
from gsrq_export.evaluate.recall import recall
from gsrq_export.evaluate.runner import Runner
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.model.introspect import ModelSpec, inspect_model
from gsrq_export.model.loading import load_model
from gsrq_export.traffic.recall_passages import plant


@dataclass(frozen=True)
class Setting:
    traffic: str
    width: int
    stages: int
    method: Method = "gskm"
    metric: str = "none"
    iterations: int = 12
    beam: int = 1

    @property
    def bits(self) -> float:
        return 8 * self.stages / self.width


def settings() -> list[Setting]:
    """The issue's table first (generic against traffic-like at four rates), then what may help at one bit."""
    rates = [(256, 32), (128, 16), (256, 12), (256, 24), (128, 12), (256, 64), (128, 32)]
    table = [Setting(traffic, d, r) for d, r in rates for traffic in ("traffic-like", "generic")]
    extra = [
        Setting("traffic-like", 256, 32, metric="attention"),
        Setting("traffic-like", 256, 32, method="kmeans"),
        Setting("traffic-like", 256, 32, method="kmeans-spherical"),
        Setting("traffic-like", 256, 32, method="kmeans", metric="attention"),
        Setting("traffic-like", 256, 32, metric="attention", beam=4),
        Setting("traffic-like", 256, 12, metric="attention"),
        Setting("traffic-like", 256, 12, method="kmeans"),
        Setting("traffic-like", 256, 24, metric="attention"),
        Setting("traffic-like", 128, 16, metric="attention"),
        Setting("traffic-like", 128, 16, method="kmeans"),
    ]
    return table[:4] + extra[:2] + table[4:] + extra[2:]


def sequences(text: str, tokenizer: Any, count: int, length: int, share: float) -> np.ndarray:
    """Windows spread evenly over the text; recall passages are planted in a share of them."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    rng = np.random.default_rng(0)
    every = max(1, round(1 / share)) if share else 0
    return np.stack(
        [
            plant(rng, ids[s : s + length], tokenizer, facts=6) if every and i % every == 0 else ids[s : s + length]
            for i, s in enumerate(starts)
        ]
    )


def train(model: Any, spec: ModelSpec, captured: Captured, setting: Setting) -> tuple[list[LayerCodebooks], float]:
    device = next(model.parameters()).device
    books, distortion = [], []
    outputs = output_projections(model, spec)
    training = Training(setting.method, setting.iterations)
    for layer in spec.layers:
        pair = []
        for kind in KINDS:
            transform = None
            if setting.metric == "attention":
                transform = attention_metric(captured, spec, layer, kind, setting.width, outputs)
            gradients = captured.gradients(layer, kind, setting.width).to(device)
            vectors = captured.vectors(layer, kind).to(device)
            book, log = train_codebook(
                vectors, gradient_weights(gradients), setting.width, setting.stages, training, transform
            )
            pair.append(book)
            distortion.append(log.held_out[-1])
        books.append(LayerCodebooks(*pair))
    return books, float(np.mean(distortion))


def judge(runner: Runner, tokenizer: Any, texts: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        out[f"perplexity {name}"] = perplexity(
            runner, ids, window_tokens=args.window, windows=args.windows, batch=args.batch
        )
        if name == next(iter(texts)):
            found = recall(runner, tokenizer, ids, lengths=args.lengths, cases=args.cases, batch=args.batch)
            out["recall"] = found["lengths"]
    return out


def effective_bits(spec: ModelSpec, books: list[LayerCodebooks], rule: CacheRule, context: int) -> float:
    """Bits a key or value element at a context length, everything counted; codebooks and metrics as stored."""
    sides = [book for pair in books for book in (pair.keys, pair.values)]
    elements = sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    code_bits, stored = 8 * sum(book.code_bytes for book in sides), sum(book.stored_bytes for book in sides)
    return count(rule, elements, code_bits, stored, context).effective_bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", action="append", required=True, help="name=file; recall uses the first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quality.json")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=540, help="start no setting after this time")
    parser.add_argument("--only", type=int, help="the first so many settings")
    args = parser.parse_args()
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, device)
    spec = inspect_model(model, model.config.max_position_embeddings)
    texts = {name: Path(file).read_text() for name, file in (e.split("=", 1) for e in args.evaluation)}
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = environment()
    results["arguments"] = {k: str(v) for k, v in vars(args).items()}
    rule = CacheRule(4, 64, 64)

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    if "exact" not in results:
        results["exact"] = judge(TorchRunner(model), tokenizer, texts, args)
        save()
        print("exact", brief(results["exact"]), f"{time.monotonic() - begin:.0f} s", flush=True)
    done = [row["setting"] for row in results["rows"]]
    heads = {layer.head_dim for layer in spec.layers}
    capture_settings = CaptureSettings(max(heads), max(heads), batch=args.batch)
    with tempfile.TemporaryDirectory() as temporary:
        captured = {}
        for name, share in (("traffic-like", 0.5), ("generic", 0.0)):
            folder = Path(temporary) / name
            folder.mkdir()
            ids = sequences(args.calibration.read_text(), tokenizer, args.sequences, args.length, share)
            capture(model, spec, ids, capture_settings, folder)
            captured[name] = Captured(folder)
            print("captured", name, f"{time.monotonic() - begin:.0f} s", flush=True)
        for setting in settings()[: args.only]:
            fits = all(layer.num_kv_heads * layer.head_dim % setting.width == 0 for layer in spec.layers)
            if not fits or asdict(setting) in done or time.monotonic() - begin > args.seconds:
                continue
            books, distortion = train(model, spec, captured[setting.traffic], setting)
            trained = time.monotonic() - begin
            with coded(model, books, rule, beam=setting.beam, spec=spec):
                found = judge(TorchRunner(model), tokenizer, texts, args)
            results["rows"].append(
                {
                    "setting": asdict(setting),
                    "nominal_bits": setting.bits,
                    "effective_bits": {str(n): effective_bits(spec, books, rule, n) for n in (2048, 8192, 131072)},
                    "held_out_distortion": distortion,
                    **found,
                }
            )
            save()
            print(
                setting, brief(found), f"trained {trained:.0f} s, judged {time.monotonic() - begin:.0f} s", flush=True
            )


def brief(found: dict[str, Any]) -> str:
    words = [f"{k} {v['perplexity']:.2f}" for k, v in found.items() if k != "recall"]
    return ", ".join([*words, *(f"recall@{row['tokens']} {row['rate']:.2f}" for row in found["recall"])])


if __name__ == "__main__":
    main()

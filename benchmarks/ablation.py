"""What each means of coding better at the same bits is worth: an ablation, one step added at a time.

    python benchmarks/ablation.py --model DIR --calibration TEXT --evaluation novels=TEXT [--evaluation wiki=TEXT ...]
        --bits 1 --bits 0.5

All rows share the calibration vectors (recall passages in every other sequence), the cache rule and the evaluation.
Greedy codebooks are trained once at the most stages that any row wants: fewer are a prefix. Writes JSON after each row;
rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, environment
from quality import brief, judge, sequences

from gsrq_export.baselines.attention import baseline
from gsrq_export.baselines.base import CacheCodec, LayerCodecs
from gsrq_export.baselines.residual import ResidualCodec
from gsrq_export.cache.rule import CacheRule
from gsrq_export.capture import (
    KINDS,
    Captured,
    CaptureSettings,
    attention_metric,
    capture,
    output_projections,
    training_vectors,
)
from gsrq_export.codec.cluster import Method
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.finetune import FinetuneLog, Finetuning, finetune
from gsrq_export.codec.refit import refit_codebook
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.model.introspect import LayerSpec, ModelSpec, inspect_model
from gsrq_export.model.loading import load_model

RULE = CacheRule(4, 64, 64)
TUNED = "+ fine-tuning, 100 steps"


@dataclass(frozen=True)
class Setting:
    """keys, values: bits an element of each. width 0 is that of all heads together. norm: a float16 norm a token,
    shared by all heads."""

    name: str
    keys: float
    values: float
    width: int = 0
    method: Method = "gskm"
    weights: str = "gradient"
    metric: str = "none"
    beam: int = 1
    refits: int = 0
    norm: bool = False
    finetune: int = 0
    learning_rate: float = 0.0
    iterations: int = 12


def ladder(bits: float, head_dim: int) -> list[Setting]:
    """The published recipe, then one means more a row, then what was tried beside."""
    published = Setting("published: a head at a time, GSKM, greedy", bits, bits, width=head_dim)
    joint = replace(published, name="heads jointly", width=0)
    metric = replace(joint, name="+ attention metric", metric="attention")
    beam = replace(metric, name="+ beam 4 in encoding", beam=4)
    refit = replace(beam, name="+ 2 refits", refits=2)
    split = replace(refit, name="+ 5/8 of the bits to keys", keys=1.25 * bits, values=0.75 * bits)
    wide = replace(refit, name="3/4 of the bits to keys", keys=1.5 * bits, values=0.5 * bits)
    tuned = replace(split, name=TUNED, finetune=100, learning_rate=0.01)
    return [
        published,
        joint,
        metric,
        beam,
        refit,
        split,
        wide,
        tuned,
        replace(tuned, name="fine-tuning, rate 0.003", learning_rate=0.003),
        replace(tuned, name="fine-tuning, rate 0.03", learning_rate=0.03),
        replace(tuned, name="fine-tuning, equal bits", keys=bits, values=bits),
        replace(tuned, name="fine-tuning, k-means from data points", method="kmeans"),
        replace(tuned, name="fine-tuning, no gradient weights", weights="none"),
        replace(tuned, name="fine-tuning, no gradient weights, 400 steps", weights="none", finetune=400),
        replace(refit, name="no gradient weights", weights="none"),
        replace(refit, name="k-means from data points", method="kmeans"),
        replace(refit, name="a norm a token", norm=True),
        replace(refit, name="beam 16", beam=16),
    ]


class NormCodec(CacheCodec):
    """A residual codebook over vectors that are divided by their length in the metric, which is stored."""

    def __init__(self, codec: ResidualCodec) -> None:
        self.codec = codec

    def reconstruct(self, vectors: torch.Tensor) -> torch.Tensor:
        length = norms(vectors.flatten(1), self.codec.codebook.transform)[..., None]
        return self.codec.reconstruct(vectors / length) * length

    def bits_per_element(self, num_kv_heads: int, head_dim: int) -> float:
        return self.codec.bits_per_element(num_kv_heads, head_dim) + 16 / (num_kv_heads * head_dim)


def norms(x: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    """Length of each row in the metric, as stored: float32 [N, 1]."""
    parts = torch.einsum("gij,ngj->ngi", transform, x.float().reshape(len(x), transform.shape[0], -1))
    return parts.flatten(1).norm(dim=1, keepdim=True).half().float().clamp(min=1e-3)


class Trainer:
    """Greedy codebooks by what decides them; each once, at the most stages wanted.

    rotated_keys: keys are coded after RoPE, see cache/frame.py.
    """

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        captured: Captured,
        settings: list[Setting],
        rotated_keys: bool = False,
    ) -> None:
        self.model, self.spec, self.captured, self.rotated_keys = model, spec, captured, rotated_keys
        self.device = next(model.parameters()).device
        self.outputs = output_projections(model, spec)
        self.made: dict[tuple[object, ...], Codebook] = {}
        self.most: dict[tuple[object, ...], int] = {}
        for setting in settings:
            for layer in spec.layers:
                for kind in KINDS:
                    key, stages = self.key(setting, layer, kind), self.stages(setting, layer, kind)
                    self.most[key] = max(stages, self.most.get(key, 0))

    def width(self, setting: Setting, layer: LayerSpec) -> int:
        return setting.width or layer.num_kv_heads * layer.head_dim

    def stages(self, setting: Setting, layer: LayerSpec, kind: str) -> int:
        return max(1, round((setting.keys if kind == "key" else setting.values) * self.width(setting, layer) / 8))

    def key(self, setting: Setting, layer: LayerSpec, kind: str) -> tuple[object, ...]:
        training = (setting.method, setting.weights, setting.metric, setting.norm, setting.iterations)
        return (layer.index, kind, self.width(setting, layer), *training)

    def transform(self, setting: Setting, layer: LayerSpec, kind: str) -> torch.Tensor:
        width = self.width(setting, layer)
        if setting.metric == "none":
            return torch.eye(width).repeat(layer.num_kv_heads * layer.head_dim // width, 1, 1)
        return attention_metric(self.captured, self.spec, layer, kind, width, self.outputs)

    def book(self, setting: Setting, layer: LayerSpec, kind: str) -> Codebook:
        key, stages, width = (
            self.key(setting, layer, kind),
            self.stages(setting, layer, kind),
            self.width(setting, layer),
        )
        vectors, center = training_vectors(self.captured, self.spec, layer, kind, self.rotated_keys, device=self.device)
        vectors = vectors.float()
        weights = None
        if setting.weights == "gradient":
            weights = gradient_weights(self.captured.gradients(layer, kind, width).to(self.device))
        transform = self.transform(setting, layer, kind).to(self.device)
        if setting.norm:
            vectors = vectors / norms(vectors, transform)
        if key not in self.made:
            training = Training(setting.method, setting.iterations)
            trained = train_codebook(vectors, weights, width, self.most[key], training, transform)[0]
            self.made[key] = replace(trained, center=center)
        book = self.made[key].first_stages(stages)
        if setting.refits:
            book = refit_codebook(book, vectors, weights, setting.beam, setting.refits)[0]
        return book

    def books(
        self, setting: Setting, ids: np.ndarray[Any, np.dtype[np.int64]], batch: int = 4
    ) -> tuple[list[LayerCodebooks], FinetuneLog | None]:
        """The codebooks of all layers; where the setting fine-tunes, on ``ids``, ``batch`` sequences a step."""
        books = [LayerCodebooks(*(self.book(setting, layer, kind) for kind in KINDS)) for layer in self.spec.layers]
        if not setting.finetune:
            return books, None
        tuning = Finetuning(setting.finetune, batch, setting.learning_rate, setting.beam)
        return finetune(self.model, self.spec, torch.from_numpy(ids), books, RULE, tuning)


def codecs_of(setting: Setting, books: list[LayerCodebooks]) -> list[LayerCodecs]:
    residual = [[ResidualCodec(book, setting.beam) for book in (pair.keys, pair.values)] for pair in books]
    return [LayerCodecs(*(NormCodec(of) if setting.norm else of for of in pair)) for pair in residual]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", action="append", required=True, help="name=file; recall uses the first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ablation.json")
    parser.add_argument("--bits", type=float, action="append", required=True)
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of names; default: all")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=540, help="start no row after this time")
    args = parser.parse_args()
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, device)
    spec = inspect_model(model, model.config.max_position_embeddings)
    texts = {name: Path(file).read_text() for name, file in (e.split("=", 1) for e in args.evaluation)}
    chosen = [
        (bits, s)
        for bits in args.bits
        for s in ladder(bits, spec.layers[0].head_dim)
        if any(part in s.name for part in args.rows)
    ]
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    results["environment"] = environment()
    results["arguments"] = {k: str(v) for k, v in vars(args).items()}

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    def note(*words: object) -> None:
        print(*words, f"{time.monotonic() - begin:.0f} s", flush=True)

    if "exact" not in results:
        results["exact"] = judge(TorchRunner(model), tokenizer, texts, args)
        save()
        note("exact", brief(results["exact"]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ids = sequences(args.calibration.read_text(), tokenizer, args.sequences, args.length, 0.5)
        width = spec.layers[0].head_dim
        capture(model, spec, ids, CaptureSettings(width, width, batch=args.batch), folder)
        note("captured")
        trainer = Trainer(model, spec, Captured(folder), [s for _, s in chosen])
        for bits, setting in chosen:
            if time.monotonic() - begin > args.seconds or asdict(setting) in [r["setting"] for r in results["rows"]]:
                continue
            start = time.monotonic()
            books, log = trainer.books(setting, ids)
            trained = time.monotonic() - start
            with baseline(model, codecs_of(setting, books), RULE, spec=spec):
                found = judge(TorchRunner(model), tokenizer, texts, args)
            seconds = {"train": round(trained, 1), "judge": round(time.monotonic() - start - trained, 1)}
            row = {"bits": bits, "setting": asdict(setting), "seconds": seconds, "finetune": log and log.to_dict()}
            results["rows"].append({**row, **found})
            save()
            kl = f", KL {log.held_out_kl[0]:.4f} to {min(log.held_out_kl):.4f}" if log else ""
            note(f"{bits:g} {setting.name}:", brief(found) + kl, seconds)


if __name__ == "__main__":
    main()

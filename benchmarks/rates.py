"""Our codebooks at a ladder of rates, for benchmarks/baselines.py to measure beside the rivals.

    python benchmarks/rates.py --model DIR --calibration TEXT --out DIR --bits 1 0.5 --finetune 100
    python benchmarks/baselines.py ... --beam 4 --ours ours-1=DIR/1.safetensors --ours ours-0.5=DIR/0.5.safetensors

    python benchmarks/rates.py ... --key-frame rotated --key-share 0.75     # DIR/1-rotated-k0.75.safetensors

The setting is the last step of benchmarks/ablation.py: heads jointly, attention metric, beam, a refit, 5/8 of the
bits to keys, fine-tuning. Greedy codebooks are trained once, at the highest rate: lower ones are their prefixes. Files
that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from ablation import TUNED, Trainer, ladder
from quality import sequences

from gsrq_export.capture import Captured, CaptureSettings, capture
from gsrq_export.codec.storage import save_codebooks
from gsrq_export.model.introspect import inspect_model
from gsrq_export.model.loading import load_model

DEFAULT_SHARE = 0.625  # of the stages, for keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory")
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    parser.add_argument("--finetune", type=int, default=100, help="steps; 0: none")
    parser.add_argument("--finetune-below", type=float, default=2, help="only rates below so many bits")
    parser.add_argument("--finetune-batch", type=int, default=4)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--refits", type=int, default=1)
    parser.add_argument("--width", type=int, default=0, help="of sub-vectors; 0: all heads of a token together")
    parser.add_argument("--key-frame", choices=["pre-rope", "rotated"], default="pre-rope", help="codec.key_frame")
    parser.add_argument("--key-share", type=float, default=DEFAULT_SHARE, help="of the stages, for keys")
    parser.add_argument("--weights", choices=["gradient", "none"], default="gradient", help="codec.weights")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    if not 0 < args.key_share < 1:
        sys.exit(f"error: --key-share {args.key_share:g}: give a share between 0 and 1, ends left out")
    rotated = args.key_frame == "rotated"
    suffix = "-rotated" * rotated + (f"-k{args.key_share:g}" if args.key_share != DEFAULT_SHARE else "")
    suffix += "-unweighted" * (args.weights == "none")
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(args.model, device)
    spec = inspect_model(model, model.config.max_position_embeddings)
    head_dim = spec.layers[0].head_dim
    settings = [
        replace(
            next(s for s in ladder(bits, head_dim) if s.name == TUNED),
            name=f"{bits:g}{suffix}",
            keys=2 * bits * args.key_share,
            values=2 * bits * (1 - args.key_share),
            width=args.width,
            beam=args.beam,
            refits=args.refits,
            finetune=args.finetune if bits < args.finetune_below else 0,
            iterations=args.iterations,
            weights=args.weights,
        )
        for bits in args.bits
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [s for s in settings if not (args.out / f"{s.name}.safetensors").exists()]
    if not todo:
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = sequences(args.calibration.read_text(), tokenizer, args.sequences, args.length, 0.5)
        width = min(args.width or head_dim, head_dim)
        capture(model, spec, ids, CaptureSettings(width, width, batch=args.batch, rotated_keys=rotated), Path(folder))
        trainer = Trainer(model, spec, Captured(Path(folder)), settings, rotated)
        for setting in todo:
            books, log = trainer.books(setting, ids, args.finetune_batch)
            facts = {
                "setting": json.dumps({**asdict(setting), "key_frame": args.key_frame}),
                "finetune": json.dumps(log and log.to_dict()),
            }
            save_codebooks(args.out / f"{setting.name}.safetensors", books, facts)
            kl = f"KL {log.held_out_kl}" if log else ""
            print(f"{setting.name} bits: {time.monotonic() - begin:.0f} s {kl}", flush=True)


if __name__ == "__main__":
    main()

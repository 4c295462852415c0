"""What every cache quantizer costs in perplexity and recall, at its honest bits, in one harness, from text files.

    python benchmarks/baselines.py --model DIR --calibration TEXT --evaluation novels=TEXT [--evaluation wiki=TEXT ...]
    python benchmarks/baselines.py ... --part 0/4 --out part0.json     # four processes, a file each
    python benchmarks/baselines.py --merge part0.json part1.json part2.json part3.json --out all.json

`gsrq compare` is the same harness over a recipe. All rows get the same calibration vectors (recall passages in every
other sequence), the same sinks, window and block, and the same evaluation texts, which must not be the calibration's.
The file is written after each row, and beside it a Markdown one; rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from environment import ROOT
from quality import sequences

from gsrq_export.baselines.base import Method
from gsrq_export.baselines.calibrate import families
from gsrq_export.baselines.methods import chosen, registry
from gsrq_export.capture import Captured, CaptureSettings, capture
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.compare.markdown import write_markdown
from gsrq_export.compare.run import run_comparison
from gsrq_export.compare.schema import Model, Prefill, Rule, save_comparison
from gsrq_export.compare.store import merge
from gsrq_export.compare.subject import EvaluationText, Ours, Subject, perplexity_only
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.fidelity import FidelitySettings
from gsrq_export.evaluate.suite import EvaluationSettings
from gsrq_export.evaluate.tasks.measure import TASKS, TaskSettings
from gsrq_export.model.introspect import inspect_model
from gsrq_export.model.loading import load_model, weight_hash
from gsrq_export.stages.progress import make_reporter

MODES: dict[str, list[Prefill]] = {"coded": ["coded"], "exact": ["exact"], "both": ["coded", "exact"]}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", action="append", help="name=file; recall uses the first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/baselines.json")
    parser.add_argument("--methods", nargs="+", default=["all"], help="ids; default: all")
    parser.add_argument("--list", action="store_true", help="print ids and labels and stop")
    parser.add_argument("--part", default="0/1", help="i/n: of n parts of the rows the i-th, counted from 0")
    parser.add_argument("--merge", nargs="+", type=Path, help="put these files together and stop")
    parser.add_argument("--ours", action="append", default=[], help="id=codebooks.safetensors; the id begins with ours")
    parser.add_argument("--beam", type=int, default=1, help="of ours")
    parser.add_argument("--prefix", type=float, nargs="+", default=[], help="also these shares of our stages")
    parser.add_argument("--int8", action="store_true", help="also ours with int8 codewords")
    parser.add_argument("--iterations", type=int, help="of every clustering; default: each method's own")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=64, help="W of the cache rule")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--prefill", choices=list(MODES), default="coded")
    parser.add_argument("--sequences", type=int, default=128, help="of calibration")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a calibration sequence")
    parser.add_argument("--window-tokens", type=int, default=2048, help="tokens of a perplexity window")
    parser.add_argument("--windows", type=int, default=24, help="perplexity windows of a text")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 8192], help="of recall; none skips it")
    parser.add_argument("--cases", type=int, default=48, help="recall cases a length")
    parser.add_argument("--tasks", type=int, nargs="+", default=[], help="context lengths of the RULER-like tasks")
    parser.add_argument("--task-cases", type=int, default=24, help="of a task and length")
    parser.add_argument("--fidelity", type=int, default=0, help="tokens of each of 8 generations; 0 skips them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    return parser.parse_args()


def part_of(methods: Mapping[str, Method], part: str) -> dict[str, Method]:
    """The part "i/n" of the rows. Rows of one training stay together; the parts have about as many rows each."""
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise GsrqError(f"--part {part}: not i/n with 0 <= i < n", "use 0/4, 1/4, 2/4, 3/4")
    ids = {method: id for id, method in methods.items()}
    parts: list[list[str]] = [[] for _ in range(int(count))]
    for family in sorted(families(list(ids)), key=len, reverse=True):
        min(parts, key=len).extend(ids[method] for method in family)
    return {id: methods[id] for id in parts[int(number)]}


def subject(args: argparse.Namespace, folder: Path) -> Subject:
    model, tokenizer = load_model(args.model, args.device)
    spec = inspect_model(model, model.config.get_text_config().max_position_embeddings)
    ids = sequences(args.calibration.read_text(), tokenizer, args.sequences, args.length, 0.5)
    settings = EvaluationSettings(
        window_tokens=args.window_tokens,
        windows=args.windows,
        recall_lengths=tuple(args.lengths),
        recall_cases=args.cases,
        batch=args.batch,
        tasks=TaskSettings(tuple(TASKS), tuple(args.tasks), args.task_cases) if args.tasks else None,
        fidelity=FidelitySettings(new_tokens=args.fidelity) if args.fidelity else None,
    )
    texts: list[EvaluationText] = []
    for name, file in (entry.split("=", 1) for entry in args.evaluation):
        texts.append(EvaluationText(name, Path(file).read_text(), perplexity_only(settings) if texts else settings))

    def captured(width: int | None) -> Captured:
        capture_settings = CaptureSettings(width or 1, width or 1, gradients=width is not None, batch=args.batch)
        capture(model, spec, ids, capture_settings, folder)
        return Captured(folder)

    identity = Model(id=args.model.resolve().name, weights_sha256=weight_hash(args.model))
    rule = Rule(sinks=args.sinks, window=args.window, block=args.block)
    return Subject(model, tokenizer, spec, identity, rule, ids, texts, captured)


def ours(args: argparse.Namespace) -> list[Ours]:
    rows = []
    for id, file in (entry.split("=", 1) for entry in args.ours):
        row = Ours(id, f"ours: {id}", load_codebooks(Path(file)), args.beam)
        rows += [row, *([row.snapped()] if args.int8 else []), *(row.prefix(share) for share in args.prefix)]
    return rows


def main() -> None:
    args, begin = options(), time.monotonic()
    if args.list:
        print("\n".join(f"{id:<20} {method.label}" for id, method in registry().items()))
        return
    if args.merge:
        found = merge(args.merge)
        save_comparison(args.out, found)
    else:
        missing = [name for name in ("model", "calibration", "evaluation") if getattr(args, name) is None]
        if missing:
            sys.exit(f"give --{', --'.join(missing)}")
        methods = part_of(chosen(args.methods, args.iterations), args.part)
        with tempfile.TemporaryDirectory() as folder:
            found = run_comparison(
                args.out,
                subject(args, Path(folder)),
                methods,
                ours(args) if args.part.startswith("0/") else [],
                MODES[args.prefill],
                make_reporter(),
                lambda: time.monotonic() - begin < args.seconds,
            )
    write_markdown(args.out.with_suffix(".md"), found)
    print(f"{args.out}: {len(found.rows)} rows")


if __name__ == "__main__":
    try:
        main()
    except GsrqError as error:
        sys.exit(f"error: {error}")

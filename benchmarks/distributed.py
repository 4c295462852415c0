"""Scaling of calibration over processes of one machine, one thread each: capture, and codebooks shared in both ways.

python benchmarks/distributed.py --model assets/demo-6m --sizes 1 2 4 --out benchmarks/results/distributed.json

Every number of processes must write the bytes that one process writes, or there is no figure. Times are from when all
have loaded the model until all are done; peak memory is the largest resident set of a process after each part. Token
ids are random. Needs torch and transformers, nothing of ONNX. --device cuda gives each process a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, environment

from gsrq_export.build.codebooks import codebooks_stage
from gsrq_export.build.source import Source
from gsrq_export.capture import CaptureSettings, capture, output_projections, shard_batch
from gsrq_export.distributed.group import joined, local_device
from gsrq_export.distributed.world import World
from gsrq_export.recipe import Recipe
from gsrq_export.stages.engine import Context
from gsrq_export.stages.progress import quiet_reporter

WAYS = ("codebooks", "rows")


def recipe(args: argparse.Namespace) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "scaling",
            "model": {"path": str(args.model)},
            "traffic": {"sequences": args.sequences, "sequence_length": args.length},
            "codec": {
                "keys": {"width": args.width, "stages": args.stages},
                "values": {"width": args.width, "stages": args.stages},
                "metric": "attention",
                "iterations": args.iterations,
                "beam": 2,
                "refits": 1,
            },
            "export": {"max_length": args.length},
            "evaluate": None,
        }
    )


class Clock:
    """Seconds of parts, from when all processes begin until all are done, and the largest resident set so far."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.found: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, part: Any) -> None:
        self.world.barrier()
        start = time.perf_counter()
        part()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.world.barrier()
        seconds = time.perf_counter() - start
        peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0], dtype=torch.float64)
        most = float(self.world.gather(peak.to(self.device)).max())
        self.found[name] = {"seconds": seconds, "peak_resident_bytes": most}


def work(args: argparse.Namespace) -> None:
    """One process; rank 0 writes what it measured."""
    with ExitStack() as stack:
        device = local_device(args.device)
        world = stack.enter_context(joined(device))
        source = Source(recipe(args), device)
        clock = Clock(world, source.place)
        spec, codec, directory = source.spec, source.recipe.codec, args.work
        vocabulary = source.model.config.get_text_config().vocab_size
        ids = np.random.default_rng(0).integers(0, vocabulary, (args.sequences, args.length))
        batch = shard_batch(args.length)
        settings = CaptureSettings(codec.keys.width, codec.values.width, batch=batch)
        if world.rank == 0:
            for name in ("capture", *WAYS):
                (directory / name).mkdir()
        output_projections(source.placed_model, spec)  # the model has run once
        shards = world.share(-(-len(ids) // batch))
        to = directory / "capture"
        clock("capture", lambda: capture(source.placed_model, spec, ids, settings, to, shards=shards))
        for way in WAYS:
            shared = Source(source.recipe, device, way)
            shared.__dict__.update({"_loaded": source._loaded, "spec": spec})  # loaded before the clock runs
            context = Context(directory / way, {"capture": to}, quiet_reporter(), world)
            clock(way, lambda of=shared, context=context: codebooks_stage(of, context))
        if world.rank == 0:
            backend = getattr(world, "backend", None)
            (directory / "times.json").write_text(json.dumps({"backend": backend, "parts": clock.found}))


def launch(args: argparse.Namespace, size: int, directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Times and file hashes of a calibration by ``size`` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), __file__]
    for name in ("model", "sequences", "length", "width", "stages", "iterations", "device"):
        command += [f"--{name}", str(getattr(args, name))]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([*command, "--work", str(directory)], check=True, env=env)
    files = sorted(directory.rglob("*.safetensors"))
    hashes = {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return json.loads((directory / "times.json").read_text()), hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets/demo-6m")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="of the world; the first must be 1")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # this is a process of a run
    args = parser.parse_args()
    args.model = args.model.resolve()
    if args.work:
        work(args)
        return
    if args.sizes[0] != 1:
        parser.error("--sizes must begin with 1, which the others are compared with")
    rows: list[dict[str, Any]] = []
    expected: dict[str, str] = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            found, hashes = launch(args, size, Path(scratch))
        expected = expected or hashes
        if hashes != expected:
            different = sorted(name for name in {*hashes, *expected} if hashes.get(name) != expected.get(name))
            raise SystemExit(f"{size} processes wrote other bytes than one: {', '.join(different)}")
        rows.append({"processes": size, **found})
        print(size, {name: round(part["seconds"], 2) for name, part in found["parts"].items()}, flush=True)
    shape = ("sequences", "length", "width", "stages", "iterations")
    result = {
        "environment": {**environment(), "threads": 1, "cores": os.cpu_count()},
        "model": args.model.name,
        "device": args.device,
        "shape": {name: getattr(args, name) for name in shape},
        "files_equal": len(expected),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

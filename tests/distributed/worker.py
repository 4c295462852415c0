"""One process of a calibration, started by torchrun or by launch.py; can be told to kill itself on the way.

--stages runs the build's own stages up to the codebooks in the work directory; without it capture and codebooks are
called directly, on given token ids, which needs nothing of ONNX.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gsrq_export.capture as capturing
from gsrq_export.build.codebooks import codebooks_stage
from gsrq_export.build.source import Source
from gsrq_export.capture import CaptureSettings, capture, shard_batch
from gsrq_export.distributed import group
from gsrq_export.distributed.group import joined, local_device
from gsrq_export.distributed.world import World
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import load_recipe
from gsrq_export.stages import engine
from gsrq_export.stages.engine import Context, Pipeline
from gsrq_export.stages.progress import quiet_reporter


def die_at(where: str, count: int) -> None:
    """SIGKILL at the ``count``-th file written, exchange of tensors or round of claims: real, and surely reached.

    Which process claims how many jobs is chance, and so is how many files it writes of them.
    """
    calls = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counting

    if where == "write":
        capturing.write_atomic = engine.write_atomic = deadly(engine.write_atomic)
    elif where == "claim":
        claim, strike = group.Group.claim, deadly(lambda: None)

        def claiming(world: group.Group, count: int) -> Iterator[int]:
            taken = claim(world, count)
            first = list(islice(taken, 1))
            strike()
            yield from first
            yield from taken

        group.Group.claim = claiming  # type: ignore[method-assign]
    elif where == "gather":
        group.Group.gather = deadly(group.Group.gather)  # type: ignore[method-assign]
    else:
        group.Group.meet = deadly(group.Group.meet)  # type: ignore[method-assign]


def direct(source: Source, world: World, work: Path) -> None:
    ids = np.load(work / "ids.npy", allow_pickle=False)
    side = source.recipe.codec
    settings = CaptureSettings(side.keys.width, side.values.width, batch=shard_batch(ids.shape[1]))
    if world.rank == 0:
        for name in ("capture", "codebooks"):
            (work / name).mkdir(exist_ok=True)
    world.barrier()
    shards, spec = world.share(-(-len(ids) // settings.batch)), source.spec
    capture(source.placed_model, spec, ids, settings, work / "capture", shards=shards)
    world.barrier()
    codebooks_stage(source, Context(work / "codebooks", {"capture": work / "capture"}, quiet_reporter(), world))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parallel", nargs="+", default=["codebooks"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--threads", nargs=2, type=int, metavar=("RANK", "THREADS"), help="of that process alone")
    parser.add_argument("--die", nargs=3, metavar=("RANK", "WHERE", "COUNT"))
    args = parser.parse_args(arguments)
    capturing.SHARD_TOKENS = 256  # several shards of little traffic
    try:
        with ExitStack() as stack:
            device = local_device(args.device)
            if args.die and args.die[0] == os.environ["RANK"]:
                die_at(args.die[1], int(args.die[2]))
            if args.threads and args.threads[0] == int(os.environ["RANK"]):
                torch.set_num_threads(args.threads[1])
            world = stack.enter_context(joined(device))
            for parallel in args.parallel:
                source = Source(load_recipe(args.recipe), device, parallel)
                if args.stages:
                    from gsrq_export.build.agreement import check_distributed
                    from gsrq_export.build.stages import stages

                    check_distributed(source, world)
                    Pipeline(args.work, stages(source)[:3], quiet_reporter(), world).run()
                else:
                    direct(source, world, args.work / parallel)
            if world.rank == 0 and world.size > 1:
                print(f"backend {world.backend}", flush=True)  # type: ignore[attr-defined]
    except GsrqError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the processes of a distributed build must have in common, checked before any work."""

from __future__ import annotations

import hashlib

import torch

from gsrq_export.build.codebooks import spread_rows
from gsrq_export.build.device import describe_device
from gsrq_export.build.source import Source
from gsrq_export.distributed.world import World
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import StdinSource
from gsrq_export.stages.keys import environment


def check_distributed(source: Source, world: World) -> None:
    """Refuse what many processes cannot do, and processes that would not calculate the same.

    Raises:
        GsrqError: naming what differs, and where.
    """
    if any(isinstance(text, StdinSource) for text in source.recipe.texts):
        raise GsrqError(
            "a source of kind stdin cannot be read by many processes", "put the text into a file that all can read"
        )
    if source.parallel == "rows":
        spread_rows(source.recipe.traffic.sequences * source.recipe.traffic.sequence_length, world)
    versions = environment()
    world.agree(
        {
            "the recipe": hashlib.sha256(source.recipe.model_dump_json().encode()).hexdigest(),
            "the option --parallel": source.parallel,
            "the version of gsrq_export (sha256 of its sources)": versions["gsrq_export"],
            "the version of torch": versions["torch"],
            "the version of transformers": versions["transformers"],
            "the device": describe_device(source.device),
            "the number of threads (OMP_NUM_THREADS)": torch.get_num_threads(),
            "the instruction set": torch.backends.cpu.get_cpu_capability(),
            "the sha256 of the model's weights": source.weight_hash,
        }
    )

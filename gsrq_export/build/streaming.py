"""Whether a build holds its model in memory or streams the weights, and what cannot be done when it streams."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gsrq_export.errors import GsrqError
from gsrq_export.model.checkpoint import Checkpoint
from gsrq_export.recipe import Recipe
from gsrq_export.recipe_errors import FieldProblem, recipe_error

SPARE = 1.25  # of the weights' bytes, for what is calculated with them
CGROUP_LIMITS = (  # of a container, which the system's own figure does not show
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True)
class Residence:
    """Where the weights are.

    Attributes:
        streamed: on disk, but for a layer at a time; else in memory.
        mode: of the recipe: auto, always or never.
        needed: bytes of all weights in float32.
        available: bytes of memory, of the GPU where that has less.
    """

    streamed: bool
    mode: str
    needed: int
    available: int

    @classmethod
    def choose(cls, recipe: Recipe, directory: Path, device: torch.device) -> Residence:
        """As ``model.streaming`` says; auto streams where the weights, and a quarter more, do not fit."""
        mode, needed, available = recipe.model.streaming, 4 * Checkpoint(directory).elements, free_memory(device)
        return cls(mode == "always" or (mode == "auto" and SPARE * needed > available), mode, needed, available)

    def __str__(self) -> str:
        where = "streamed, a layer at a time" if self.streamed else "in memory"
        return f"{where}: {_gb(self.needed)} in float32, {_gb(self.available)} of memory available"


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still have here: its share, where a launcher starts several on this machine."""
    found = [int(psutil.virtual_memory().available)]
    for limit, usage in CGROUP_LIMITS:
        try:
            found.append(int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    found = [min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
    if device.type == "cuda":
        found.append(int(torch.cuda.mem_get_info(device)[0]))
    return max(0, min(found))


def check_streamed(recipe: Recipe, residence: Residence) -> None:
    """Refuse what needs the whole model in memory, where it is streamed.

    Raises:
        GsrqError: every such field of the recipe, with its value and what to do.
    """
    if not residence.streamed:
        return
    why = f"needs the whole model in memory, and it is {residence}"
    or_whole = _whole(residence)
    problems = [
        FieldProblem(f"traffic.sources.{i}.kind", "self", why, f"give text (kind: jsonl or text){or_whole}")
        for i, source in enumerate(recipe.traffic.sources)
        if source.kind == "self"
    ]
    if recipe.codec.finetune is not None:
        problems.append(
            FieldProblem("codec.finetune", recipe.codec.finetune.model_dump(), why, f"leave it out{or_whole}")
        )
    if recipe.evaluate is not None:
        given = recipe.evaluate.model_dump(mode="json", exclude_none=True)
        problems.append(FieldProblem("evaluate", given, why, f"write evaluate: null{or_whole}"))
    if problems:
        raise recipe_error(recipe.name, problems)


def require_whole(recipe: Recipe, residence: Residence, doing: str) -> None:
    """Refuse a command that runs the whole model.

    Args:
        doing: the command.
    """
    if residence.streamed:
        raise GsrqError(
            f"recipe {recipe.name}: model.streaming = {residence.mode!r}: {doing} needs the whole model in memory, and "
            f"it is {residence}",
            f"build without it{_whole(residence)}",
        )


def _whole(residence: Residence) -> str:
    if residence.mode == "always":
        return ", or set model.streaming: auto"
    return f", or use a machine with {_gb(int(SPARE * residence.needed))} of free memory"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"

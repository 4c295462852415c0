"""The stage that trains the codebooks, by one process or many.

Many processes share the work in one of two ways, which the command line chooses:

- codebooks: each process trains whole codebooks, one at a time, whichever is next. Nothing is exchanged.
- rows: all train the same codebook, each on its part of the rows; sums over rows go round (codec/rows.py).

Either way the result is that of one process, to the bit. The two ways differ in rounding: rows enters the stage's key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from gsrq_export.build.source import Source
from gsrq_export.capture import (
    KINDS,
    Captured,
    attention_metric,
    framed_keys,
    output_projections,
    training_vectors,
)
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.refit import HOLD_OUT
from gsrq_export.codec.residual import Distortion, Training, gradient_weights, train_codebook, train_parts
from gsrq_export.codec.rows import Rows
from gsrq_export.codec.storage import CODEBOOKS_FILE, book_tensors, load_book, save_book, save_codebooks
from gsrq_export.distributed.world import World
from gsrq_export.errors import GsrqError
from gsrq_export.model.introspect import LayerSpec
from gsrq_export.stages.engine import Context
from gsrq_export.stages.storage import await_files, json_writer

PARTS = 32  # of the rows; also the most processes that can share them
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """One codebook: the keys or the values of a layer."""

    layer: LayerSpec
    kind: str
    width: int
    stages: int

    @property
    def file(self) -> str:
        return f"layer-{self.layer.index:03d}.{self.kind}.safetensors"

    @property
    def steps(self) -> int:
        """Sub-vectors times stages."""
        return self.layer.num_kv_heads * self.layer.head_dim // self.width * self.stages


def codebooks_stage(source: Source, context: Context) -> None:
    """Writes each codebook as a unit, then all of them as one file and ``distortion.json``."""
    codec, world = source.recipe.codec, context.world
    jobs = []
    for layer in source.spec.layers:
        for kind in KINDS:
            side = codec.side(kind, layer.index)
            jobs.append(Job(layer, kind, side.width, side.stages))
    trainer = _Trainer(source, Captured(context.inputs["capture"]), world)
    done = world.tell([job.file for job in jobs if context.has(job.file)])
    todo = sorted((job for job in jobs if job.file not in done), key=lambda job: -job.steps)  # long ones first
    with context.reporter.task("codebooks: stages", sum(job.steps for job in jobs)) as task:
        advance = world.progress(task)
        if world.rank == 0:
            advance(sum(job.steps for job in jobs if job.file in done))
        if source.parallel == "rows":
            for job in todo:
                book, log = trainer.train_rows(job, advance)
                if world.rank == 0:
                    _save(context, job, book, log)
        else:
            for place in world.claim(len(todo)):
                _save(context, todo[place], *trainer.train(todo[place], advance))
        world.barrier()
    if world.rank == 0:
        _gather(context, jobs)


def _save(context: Context, job: Job, book: Codebook, log: Distortion) -> None:
    context.unit(job.file, partial(save_book, book.to("cpu"), metadata={"distortion": json.dumps(log.to_dict())}))


def _gather(context: Context, jobs: list[Job]) -> None:
    await_files([context.directory / job.file for job in jobs])
    books: dict[int, list[Codebook]] = {}
    logs = []
    for job in jobs:
        book, metadata = load_book(context.directory / job.file)
        books.setdefault(job.layer.index, []).append(book)
        logs.append({"layer": job.layer.layer_idx, "kind": job.kind, **json.loads(metadata["distortion"])})
    layers = [LayerCodebooks(*pair) for pair in books.values()]
    context.unit(CODEBOOKS_FILE, lambda path: save_codebooks(path, layers, {}))
    context.unit("distortion.json", json_writer(logs))


@dataclass(frozen=True)
class _Trainer:
    source: Source
    captured: Captured
    world: World

    @cached_property
    def _outputs(self) -> Sequence[torch.Tensor]:
        return output_projections(self.source.model, self.source.spec)

    @property
    def _training(self) -> Training:
        codec = self.source.recipe.codec
        return Training(codec.method, codec.iterations, codec.seed, codec.beam, codec.refits)

    def _weights(self, job: Job) -> torch.Tensor | None:
        codec = self.source.recipe.codec
        if codec.weights != "gradient":
            return None
        return gradient_weights(self.captured.gradients(job.layer, job.kind, job.width), codec.tau)

    def _transform(self, job: Job) -> torch.Tensor | None:
        if self.source.recipe.codec.metric != "attention":
            return None
        return attention_metric(self.captured, self.source.spec, job.layer, job.kind, job.width, self._outputs)

    def train(self, job: Job, progress: Progress) -> tuple[Codebook, Distortion]:
        """By this process alone."""
        source = self.source
        vectors, center = training_vectors(
            self.captured, source.spec, job.layer, job.kind, source.recipe.codec.rotated_keys, source.place
        )
        book, log = train_codebook(
            vectors, self._weights(job), job.width, job.stages, self._training, self._transform(job), progress
        )
        return replace(book, center=center), log

    def train_rows(self, job: Job, progress: Progress) -> tuple[Codebook, Distortion]:
        """By all processes, each on its rows."""
        positions = self.captured.positions()
        rows = spread_rows(len(positions), self.world)
        slices = [slice(rows.bounds[part], rows.bounds[part + 1]) for part in rows.here]
        vectors = [self.captured.rows(job.layer, job.kind, s).to(self.source.place) for s in slices]
        center = None
        if job.kind == "key" and self.source.recipe.codec.rotated_keys:
            center = (rows.total(lambda i: vectors[i].double().sum(0)) / rows.count).float()
            vectors = [
                framed_keys(part, positions[s], center, self.source.spec, job.layer)
                for part, s in zip(vectors, slices, strict=True)
            ]
        weights = self._weights(job)
        parts = None if weights is None else [weights[s].clone() for s in slices]
        book, log = train_parts(
            vectors,
            parts,
            job.width,
            job.stages,
            self._training,
            rows,
            self._transform(job),
            progress if self.world.rank == 0 else lambda count: None,  # all take the same steps
        )
        book = replace(book, center=center)
        self.world.agree({f"the codebook of layer {job.layer.index}, {job.kind}s,": _digest(book)})
        return book, log


def spread_rows(count: int, world: World) -> Rows:
    """``count`` rows over the processes.

    Raises:
        GsrqError: too few rows, or more processes than parts.
    """
    if world.size > PARTS:
        raise GsrqError(
            f"--parallel rows: {world.size} processes, at most {PARTS} can share the rows of a codebook",
            "start fewer processes, or use --parallel codebooks",
        )
    blocks = count // HOLD_OUT
    if blocks < PARTS:
        raise GsrqError(
            f"--parallel rows: {count} calibration tokens, at least {PARTS * HOLD_OUT} are needed",
            "raise traffic.sequences or traffic.sequence_length, or use --parallel codebooks",
        )
    bounds = (*(part * blocks // PARTS * HOLD_OUT for part in range(PARTS)), count)
    return Rows(bounds, world.rank, world.size, world.gather)


def _digest(book: Codebook) -> str:
    digest = hashlib.sha256()
    for tensor in book_tensors(book).values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""A recipe's traffic as token sequences, counted and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.model.loading import check_tokenizer
from gsrq_export.recipe import SelfSource, Source, TrafficRecipe
from gsrq_export.stages.keys import file_hash
from gsrq_export.traffic.recall_passages import Ids, plant
from gsrq_export.traffic.sample import sample_sequences
from gsrq_export.traffic.sources import FileSource, Piece, Tally, read_pieces, streams_of
from gsrq_export.traffic.tokens import draw_sequences, starts_with_bos

Progress = Callable[[str, int, int | None], None]  # (what, done, total where known)


@dataclass(frozen=True)
class Traffic:
    """Calibration traffic.

    Attributes:
        ids: int64 [sequences, sequence_length].
        sha256: of the content of all sources, in order: the bytes of files, the tokens of what was sampled.
        stats: counts for the manifest and report: sequences, tokens, recall_sequences, and per source kind,
            sequences, and of files their bytes, documents, number and sha256.
    """

    ids: Ids
    sha256: str
    stats: dict[str, Any]


def build_traffic(
    recipe: TrafficRecipe,
    tokenizer: Any,
    model: Any | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> Traffic:
    """Read or sample all sources and pack them; deterministic from the recipe's seeds.

    Args:
        model: needed where a source is `self`; also says how many embeddings there are.
        vocab_size: rows of the embedding, where there is no model.
    Raises:
        GsrqError: malformed, empty or too little text; a tokenizer that is not the model's.
    """
    if model is not None:
        vocab_size = int(model.get_input_embeddings().num_embeddings)
    if vocab_size is not None:
        check_tokenizer(tokenizer, vocab_size)
    for source in recipe.sources:  # all paths before any long work
        if not isinstance(source, SelfSource):
            streams_of(source)
        elif model is None:
            raise ValueError("traffic from `self` needs the model")
    digest = hashlib.sha256()
    parts: list[Ids] = []
    details: list[dict[str, Any]] = []
    for index, (source, count) in enumerate(zip(recipe.sources, allocate(recipe), strict=True)):
        ids, detail = _from_source(source, count, index, recipe, tokenizer, model, progress)
        parts.append(ids)
        details.append({"kind": source.kind, "sequences": count, **detail})
        digest.update(f"{source.kind}:{detail['sha256']}\n".encode())
    rng = np.random.default_rng([recipe.seed, 1])
    ids = np.concatenate(parts)[rng.permutation(recipe.sequences)]
    chosen = rng.permutation(recipe.sequences)[: round(recipe.recall_share * recipe.sequences)]
    keep = int(starts_with_bos(tokenizer) is not None)  # a first token that must stay first
    for row in chosen:
        ids[row, keep:] = plant(rng, ids[row, keep:], tokenizer)
    _check_ids(ids, vocab_size)
    stats = {
        "sequences": recipe.sequences,
        "sequence_length": recipe.sequence_length,
        "tokens": int(ids.size),
        "recall_sequences": len(chosen),
        "sources": details,
    }
    return Traffic(ids, digest.hexdigest(), stats)


def traffic_material(recipe: TrafficRecipe) -> dict[str, Any]:
    """Key material of a traffic stage: the recipe with every path replaced by its files' contents.

    Raises:
        GsrqError: a path that names no file.
    """
    return {**recipe.model_dump(mode="json"), "sources": [source_material(s) for s in recipe.sources]}


def source_material(source: Source) -> dict[str, Any]:
    """Key material of one source; see `traffic_material`. stdin must have been spooled to a file."""
    plain = source.model_dump(mode="json")
    if isinstance(source, SelfSource):
        return plain
    streams = streams_of(source)
    if any(s.path is None for s in streams):
        raise ValueError("stdin has no key before it is read: spool it first")
    plain["path"] = [file_hash(s.path) for s in streams if s.path]
    return plain


def allocate(recipe: TrafficRecipe) -> list[int]:
    """Sequences of each source: in proportion to the shares, by largest remainders, at least one each.

    Raises:
        GsrqError: more sources than sequences.
    """
    shares = np.asarray([source.share for source in recipe.sources])
    if len(shares) > recipe.sequences:
        raise GsrqError(
            f"traffic.sequences = {recipe.sequences}: fewer than the {len(shares)} sources",
            f"raise traffic.sequences to {len(shares)} or more",
        )
    exact = shares / shares.sum() * (recipe.sequences - len(shares))
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: recipe.sequences - len(shares) - counts.sum()]:
        counts[i] += 1
    return [int(c) + 1 for c in counts]


def _check_ids(ids: Ids, vocab_size: int | None) -> None:
    highest, lowest = int(ids.max()), int(ids.min())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        raise GsrqError(
            f"traffic has token ids {lowest} .. {highest}, the model has {vocab_size} embeddings",
            "use the tokenizer that belongs to the model",
        )


def _from_source(
    source: Source,
    count: int,
    index: int,
    recipe: TrafficRecipe,
    tokenizer: Any,
    model: Any | None,
    progress: Progress | None,
) -> tuple[Ids, dict[str, Any]]:
    length = recipe.sequence_length
    if isinstance(source, SelfSource):
        total = count * (length - 1)
        report = (lambda done: progress("sampling traffic (tokens)", done, total)) if progress else None
        first = _first_token(tokenizer)
        ids = sample_sequences(model, first, count, length, source.temperature, source.seed, report)
        return ids, {"sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()}
    rng = np.random.default_rng([recipe.seed, 0, index])
    tally = Tally()
    pieces = _all_pieces(source, tokenizer, tally, progress)
    ids = draw_sequences(pieces, tokenizer, count, length, rng, getattr(source, "path", source.kind))
    detail = {"bytes": tally.size, "documents": tally.documents, "files": tally.files}
    return ids, {**detail, "sha256": tally.digest.hexdigest()}


def _all_pieces(source: FileSource, tokenizer: Any, tally: Tally, progress: Progress | None) -> Iterator[Piece]:
    streams = streams_of(source)
    sizes = [s.path.stat().st_size if s.path else None for s in streams]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    for stream in streams:
        for piece in read_pieces(stream, tokenizer, tally):
            yield piece
            if progress:
                progress(f"reading {source.kind} traffic (bytes)", tally.size, total)


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise GsrqError(
        "traffic source self: the tokenizer has neither a begin- nor an end-of-text token to start from",
        "give traffic as files",
    )

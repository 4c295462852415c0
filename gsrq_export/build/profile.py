"""The profile of a build's codebooks: how they code the calibration tokens that training held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gsrq_export.build.source import Source
from gsrq_export.capture import Captured, framed_keys
from gsrq_export.codec.codebook import Codebook
from gsrq_export.codec.profile import Profile, profile_codebook
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.report.schema import Kind, LayerProfile
from gsrq_export.stages.engine import Context
from gsrq_export.stages.storage import json_writer

PROFILE_FILE = "profile.json"


def profile_codebooks(
    source: Source, captured: Path, codebooks: Path, progress: Callable[[int], None] = lambda count: None
) -> list[LayerProfile]:
    """An entry a layer and kind.

    Args:
        captured: the directory of shards that the recipe's traffic gave.
        codebooks: any codebooks of this model, trained or tuned further.
        progress: called with 1 after each codebook.
    """
    recipe, vectors = source.recipe, Captured(captured)
    found = []
    for layer, pair in zip(source.spec.layers, load_codebooks(codebooks), strict=True):
        sides: tuple[tuple[Kind, Codebook], ...] = (("key", pair.keys), ("value", pair.values))
        for kind, book in sides:
            coded = vectors.vectors(layer, kind)
            if book.center is not None:
                coded = framed_keys(coded, vectors.positions(), book.center, source.spec, layer)
            profile = profile_codebook(
                book,
                coded,
                recipe.traffic.sequence_length,
                layer.num_kv_heads,
                recipe.codec.beam,
                vectors.positions(),
            )
            found.append(LayerProfile(layer.layer_idx, kind, profile))
            progress(1)
    return found


def profile_stage(source: Source, captured: Path, codebooks: Path, context: Context) -> None:
    """Writes ``profile.json`` into the stage's directory."""
    with context.reporter.task("profile: codebooks", 2 * len(source.spec.layers)) as task:
        found = profile_codebooks(source, captured, codebooks, task.advance)
    data = [{"layer": p.layer, "kind": p.kind, "profile": p.profile.to_dict()} for p in found]
    context.unit(PROFILE_FILE, json_writer(data))


def load_profiles(path: Path) -> list[LayerProfile]:
    """Read what ``profile_stage`` wrote."""
    return [LayerProfile(d["layer"], d["kind"], Profile.from_dict(d["profile"])) for d in json.loads(path.read_text())]

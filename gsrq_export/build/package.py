"""Puts finished stages together into an artifact and publishes it, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from gsrq_export import native
from gsrq_export.accounting import LayerShape, contexts, footprint, nominal_bits
from gsrq_export.artifact.manifest import (
    CacheEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    SideEntry,
    TrafficEntry,
    make_manifest,
    save_manifest,
    with_file,
)
from gsrq_export.artifact.publish import publish
from gsrq_export.artifact.staging import staging_directory
from gsrq_export.build.device import describe_device
from gsrq_export.build.profile import PROFILE_FILE, load_profiles
from gsrq_export.build.rivals import COMPARISON
from gsrq_export.build.source import Source
from gsrq_export.codec.storage import SIDES
from gsrq_export.compare.rates import rate_points
from gsrq_export.compare.schema import load_comparison
from gsrq_export.export.function import OPERATOR_VERSION
from gsrq_export.export.model import CODEBOOKS_FILE, MODEL_FILE, WEIGHTS_FILE
from gsrq_export.export.triton import TritonSettings, write_triton_repository
from gsrq_export.export.triton_python import PythonSettings, write_python_model
from gsrq_export.model.loading import TOKENIZER_FILES
from gsrq_export.recipe import Recipe, resolved_yaml
from gsrq_export.report.html import write_report
from gsrq_export.report.schema import BuildMetrics, CacheSize, Distortion
from gsrq_export.runtime.metadata import CacheMetadata
from gsrq_export.runtime.metadata import LayerShape as CachedLayer
from gsrq_export.serve.limits import Limits
from gsrq_export.stages.storage import disk_errors

KEY_FRAMES = {"pre-rope": "before RoPE", "rotated": "after RoPE"}  # as pages and commands put it


def publish_artifact(source: Source, done: Mapping[str, Path], out: Path) -> None:
    """Assemble the artifact beside ``out`` and move it there.

    Args:
        done: the finished stages' directories, by name.
    """
    with disk_errors("artifact", out.parent.absolute()):
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging_directory(out) as building:
            _assemble(source, done, building)
            publish(building, out)


def _assemble(source: Source, done: Mapping[str, Path], building: Path) -> None:
    recipe = source.recipe
    # Copies, not links: whatever happens to the artifact must not reach the stages it would be built from again.
    for name in (MODEL_FILE, WEIGHTS_FILE, CODEBOOKS_FILE):
        shutil.copyfile(done["onnx"] / name, building / name)
    (building / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, building / "tokenizer" / name)
    (building / "recipe.resolved.yaml").write_text(resolved_yaml(recipe), "utf-8")
    graph = onnx.load(str(building / MODEL_FILE), load_external_data=False)
    cache = CacheMetadata.from_properties({p.key: p.value for p in graph.metadata_props})
    traffic = json.loads((done["traffic"] / "traffic.json").read_text())
    metrics = _metrics(recipe, cache, done)
    metrics.save(building / "metrics.json")
    served, triton = recipe.triton.name or recipe.name.replace(".", "_"), recipe.triton
    most = triton.max_sequences
    write_triton_repository(building, served, TritonSettings(triton.max_batch_size, most, op_library=triton.op_library))
    write_python_model(building, served, PythonSettings(Limits(most), op_library=triton.op_library or "auto"))
    library = native.find()
    manifest = make_manifest(
        building,
        name=recipe.name,
        model=ModelEntry(id=recipe.model.path, revision=recipe.model.revision, weights_sha256=source.weight_hash),
        traffic=TrafficEntry(
            sha256=traffic["sha256"],
            sequences=recipe.traffic.sequences,
            sequence_length=recipe.traffic.sequence_length,
        ),
        cache=CacheEntry(**recipe.cache.model_dump(), beam=recipe.codec.beam, key_frame=recipe.codec.key_frame),
        layers=[_layer_entry(recipe, i, layer) for i, layer in enumerate(cache.layers)],
        op_version=OPERATOR_VERSION,
        opset=next(o.version for o in graph.opset_import if o.domain == ""),
        libraries={library.name: library} if library else {},
        device={**describe_device(source.device), **source.reduced},
    )
    # The report shows the manifest's provenance, and the manifest lists the report.
    write_report(building / "report.html", metrics, _built(recipe, cache, traffic, done), _provenance(manifest))
    save_manifest(building, with_file(manifest, building, "report.html"))


def _layer_entry(recipe: Recipe, index: int, layer: CachedLayer) -> LayerEntry:
    sides = [recipe.codec.side(kind, index) for kind in SIDES]
    keys, values = (SideEntry(width=side.width, stages=side.stages) for side in sides)
    return LayerEntry(num_kv_heads=layer.num_kv_heads, head_dim=layer.head_dim, keys=keys, values=values)


def _metrics(recipe: Recipe, cache: CacheMetadata, done: Mapping[str, Path]) -> BuildMetrics:
    shapes = [LayerShape(layer.num_kv_heads, layer.head_dim) for layer in cache.layers]
    sizes = []
    for context in contexts(recipe.export.max_length):
        size = footprint(recipe, shapes, context)
        sizes.append(
            CacheSize(context, size.codes, size.exact, size.codebooks, size.fp16, round(size.effective_bits, 4))
        )
    logs = json.loads((done["codebooks"] / "distortion.json").read_text())
    distortion = [Distortion(log["layer"], log["kind"], log["held_out"], log["usage"]) for log in logs]
    evaluation = json.loads((done["evaluate"] / "evaluation.json").read_text()) if "evaluate" in done else {}
    rates = rate_points(load_comparison(done["compare"] / COMPARISON)) if "compare" in done else []
    return BuildMetrics(
        name=recipe.name,
        nominal_bits=nominal_bits(recipe, shapes),
        key_bits=nominal_bits(recipe, shapes, ["key"]),
        value_bits=nominal_bits(recipe, shapes, ["value"]),
        sizes=sizes,
        distortion=distortion,
        profile=load_profiles(done["profile"] / PROFILE_FILE),
        rates=rates,
        **evaluation,
    )


def _built(
    recipe: Recipe, cache: CacheMetadata, traffic: Mapping[str, Any], done: Mapping[str, Path]
) -> dict[str, object]:
    codec, rule, first = recipe.codec, recipe.cache, cache.layers[0]
    kinds = ", ".join(source["kind"] for source in traffic["stats"]["sources"])
    tuned: dict[str, object] = {}
    if "finetune" in done:
        log = json.loads((done["finetune"] / "finetune.json").read_text())
        kl = log["held_out_kl"]
        tuned["Fine-tuning"] = (
            f"KL to the model on held-out traffic {kl[0]:.4g} before, {min(kl):.4g} nats a token after, "
            f"{log['steps'][-1]} steps"
        )
    return {
        "Model": recipe.model.path,
        "Layers with a cache": f"{len(cache.layers)}, {first.num_kv_heads} KV heads of {first.head_dim}",
        "Traffic": f"{traffic['stats']['tokens']:,} tokens ({kinds}), recall passages in "
        f"{traffic['stats']['recall_sequences']} of {recipe.traffic.sequences} sequences",
        "Codec": f"{codec.method}, metric {codec.metric}, weights {codec.weights}, {codec.iterations} iterations, "
        f"beam {codec.beam}, refits {codec.refits}, codewords {codec.codewords}, keys coded "
        f"{KEY_FRAMES[codec.key_frame]}",
        **tuned,
        "Keys": budgets(recipe, "key", len(cache.layers)),
        "Values": budgets(recipe, "value", len(cache.layers)),
        "Cache rule": f"{rule.sinks} sinks, window {rule.window}, blocks of {rule.block}, {rule.exact_dtype}, "
        f"prefill {rule.prefill}, codes ordered by {rule.code_order}",
        "Longest context": f"{recipe.export.max_length} tokens",
    }


def budgets(recipe: Recipe, kind: str, layers: int) -> str:
    """ "D=128, R=16", or each such budget with the layers that have it."""
    found: dict[str, list[str]] = {}
    for i in range(layers):
        side = recipe.codec.side(kind, i)
        found.setdefault(f"D={side.width}, R={side.stages}", []).append(str(i))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{budget} in layers {' '.join(which)}" for budget, which in found.items())


def _provenance(manifest: Manifest) -> dict[str, object]:
    return {
        "Created by": manifest.created_by,
        "Weights sha256": manifest.model.weights_sha256,
        "Traffic sha256": manifest.traffic.sha256,
        "Codebooks sha256": manifest.files[CODEBOOKS_FILE].sha256,
        "Graph sha256": manifest.files[MODEL_FILE].sha256,
        "Code sha256": manifest.code.sha256,
        "Operator": f"version {manifest.op_version}, opset {manifest.opset}",
        **{f"Library {name}": digest for name, digest in manifest.libraries.items()},
        **{name: value for name, value in manifest.environment.items() if name != "gsrq_export"},
    }

"""An artifact for TensorRT: the ONNX graph that its parser takes, the commands that build a plan, a Triton repository.

The parser looks an operator up among its own, then among the model's local functions, then among plugins: so the
graph loses its function, and each node names the plugin. Codes stay int8 (plugins take no uint8), lengths int64; the
network is strongly typed, as int8 tensors would need scales otherwise. Weights and codebooks are hard links.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from gsrq_export import native
from gsrq_export.artifact.staging import staging_directory
from gsrq_export.artifact.verify import verify_artifact
from gsrq_export.errors import GsrqError
from gsrq_export.export.function import DOMAIN, OPERATOR, OPERATOR_VERSION
from gsrq_export.export.triton import INPUTS, TritonSettings, sequence_config
from gsrq_export.export.triton_files import check_name, load_graph, model_files
from gsrq_export.runtime.metadata import PARTS, CacheMetadata

SETTINGS, SCRIPT, PLAN, LIBRARIES = "tensorrt.json", "build_engine.sh", "model.plan", "lib"
PLUGIN = {"plugin_version": str(OPERATOR_VERSION), "plugin_namespace": DOMAIN}  # attributes that the parser reads
INSTANCES = "instance_group [\n  {{\n    count: {count}\n    kind: KIND_GPU\n    profile: [ {profiles} ]\n  }}\n]\n"
SHELL = """#!/bin/sh
# Builds the plan with trtexec of TensorRT 10.3 or later, on the kind of GPU that will run it.
#   ./{script}              -> {plan}, for Triton
#   ./{script} --in-place   -> in_place.plan: caches are updated where they lie; the caller binds each
#                                  past.* and its present.* to one address
set -eu
cd "$(dirname "$0")"
plan={plan}
preview=
if [ "${{1:-}}" = --in-place ]; then plan=in_place.plan; preview=--preview=+aliasedPluginIO1003; fi
plugin=${{GSRQ_TENSORRT_PLUGIN:-$(ls lib/libgsrq_tensorrt*.so 2>/dev/null || true)}}
[ -f "$plugin" ] || {{
  echo "lib/ must hold one plugin, or GSRQ_TENSORRT_PLUGIN name that of your TensorRT; found: $plugin" >&2
  echo "gsrq plugins build --cuda --tensorrt-headers DIR makes it" >&2
  exit 2
}}
exec trtexec --onnx=model.onnx --stronglyTyped --staticPlugins="$plugin" $preview --skipInference \\
  --saveEngine="$plan" \\
{profiles}
"""

Range = tuple[int, int, int]  # least, usual, most


@dataclass(frozen=True)
class Limits:
    """What plans are built for.

    Attributes:
        max_batch_size: sequences in a call.
        max_tokens: new tokens a sequence in a call; longer prompts take several.
    """

    max_batch_size: int = 8
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_tokens"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise GsrqError(f"{name}: {getattr(self, name)} is not in 1 .. {1 << 20}", "use 1 or more")


def export_tensorrt(artifact: Path, out: Path, limits: Limits, settings: TritonSettings, name: str) -> None:
    """Write ``out``: graph, weights, script, Triton repository, and the libraries that are built here.

    Args:
        name: of the model in the repository.
        settings: its max_batch_size is that of ``limits``.
    Raises:
        ArtifactError: the artifact is not sound.
        GsrqError: ``out`` holds files, the name is bad, or a length that the artifact forbids is asked for.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GsrqError(f"--out {out} exists and is not an empty directory", "name another place")
    check_name(name)
    manifest = verify_artifact(artifact, deep=False).manifest
    model = load_graph(artifact / "model.onnx")
    metadata = CacheMetadata.from_properties({p.key: p.value for p in model.metadata_props})
    if metadata.exact_prefill and limits.max_tokens < metadata.max_length:
        raise GsrqError(
            f"max_tokens: {limits.max_tokens} cuts prompts of up to {metadata.max_length} tokens, and with exact "
            "prefill a prompt must be one call",
            f"give --max-tokens {metadata.max_length}",
        )
    ranges = profiles(metadata, limits)
    count = {"count": settings.instances, "profiles": ", ".join(f'"{i}"' for i in range(len(ranges)))}
    config = sequence_config(model, name, settings, "tensorrt", INSTANCES.format(**count))
    files = [file for file in model_files(artifact) if file.name != "model.onnx"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging_directory(out) as building:
        for file in files:
            (building / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link((artifact / file).resolve(), building / file)
            except OSError:
                shutil.copyfile(artifact / file, building / file)
            (building / file).chmod(0o444)
        (building / "model.onnx").write_bytes(tensorrt_graph(model).SerializeToString(deterministic=True))
        repository = building / "triton" / name
        (repository / "1").mkdir(parents=True)
        (repository / "config.pbtxt").write_text(config, "utf-8")
        plan = f"triton/{name}/1/{PLAN}"
        text = SHELL.format(script=SCRIPT, plan=plan, profiles=trtexec_profiles(ranges))
        (building / SCRIPT).write_text(text, "utf-8")
        (building / SCRIPT).chmod(0o755)
        described = {
            "artifact": manifest.name,
            "graph_sha256": manifest.files["model.onnx"].sha256,
            "plan": plan,
            "plugin": {"name": OPERATOR, **PLUGIN},
            "profiles": ranges,
        }
        (building / SETTINGS).write_text(json.dumps(described, indent=1) + "\n", "utf-8")
        (building / LIBRARIES).mkdir()
        for target in (*native.TENSORRT.values(), native.CUDA):
            library = native.find(target)
            if library is not None:
                shutil.copyfile(library, building / LIBRARIES / target.library)
        building.replace(out)


def tensorrt_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the operator's function, its nodes naming the plugin; the model given is not changed.

    Raises:
        GsrqError: it has no node of the operator.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.functions[:]
    nodes = [node for node in changed.graph.node if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    if not nodes:
        raise GsrqError(f"model.onnx has no node {DOMAIN}::{OPERATOR}", "name an artifact that `gsrq build` wrote")
    for node in nodes:
        node.attribute.extend(helper.make_attribute(key, value) for key, value in PLUGIN.items())
    return changed


def profiles(metadata: CacheMetadata, limits: Limits) -> list[dict[str, list[list[int]]]]:
    """Optimization profiles of calls of several tokens, then of one: each input's least, usual and largest shape."""
    most = min(limits.max_tokens, metadata.max_length)
    batch = limits.max_batch_size
    full = metadata.full_capacity
    capacity: Range = (min(metadata.rule.block, full), full, full)
    found = []
    for batches, tokens in (((1, 1, batch), (1, max(1, most // 2), most)), ((1, batch, batch), (1, 1, 1))):
        shapes: dict[str, list[list[int]]] = {}
        for at in range(3):
            own = {"input_ids": [batches[at], tokens[at]], "logit_indices": [batches[at], 1]}
            for name in INPUTS:
                shapes.setdefault(name, []).append(own.get(name, [batches[at]]))
            for layer in range(len(metadata.layers)):
                for part in PARTS:
                    shape = list(metadata.shape(layer, part, batches[at], capacity[at]))
                    shapes.setdefault(f"past.{layer}.{part}", []).append(shape)
        found.append(shapes)
    return found


def trtexec_profiles(ranges: list[dict[str, list[list[int]]]]) -> str:
    """trtexec's options for the profiles, a line each."""
    lines = []
    for i, shapes in enumerate(ranges):
        lines.append(f"  --profile={i}")
        for at, kind in enumerate(("min", "opt", "max")):
            listed = ",".join(f"{name}:{'x'.join(map(str, shape[at]))}" for name, shape in shapes.items())
            lines.append(f"  --{kind}Shapes={listed}")
    return " \\\n".join(lines)

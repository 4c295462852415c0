"""A Triton model repository for an artifact: its ONNX graph under the onnxruntime backend.

The coded cache is implicit sequence state. Triton zeroes it when a sequence starts, hands it to the graph as
``past.*`` and keeps the ``present.*`` that come back, each sequence its own. A client sends every request of
a sequence with one correlation id, the start flag on the first, the end flag on the last, batch size 1 (Triton
itself batches sequences whose requests have equal shapes) and four tensors:

    input_ids      [1, T]   the prompt, then a token at a time
    past_lengths   [1, 1]   tokens sent in this sequence before: the graph returns no length, the client counts
    new_lengths    [1, 1]   T
    logit_indices  [1, N]   the positions, of the T, whose logits are wanted: [[T - 1]] to generate

Requests of a sequence must wait for each other's answer. A wrong past_lengths gives wrong text, not an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from gsrq_export.errors import ArtifactError, GsrqError
from gsrq_export.export.triton_files import check_library, check_name, link_files, load_graph, model_files
from gsrq_export.runtime.metadata import PARTS, CacheMetadata

TYPES = {
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
}
STATE_TYPES = {"int8": "TYPE_INT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
VECTORS = ("past_lengths", "new_lengths")  # [batch] in the graph; Triton's tensors have a dimension at least
INPUTS = ("input_ids", *VECTORS, "logit_indices")


@dataclass(frozen=True)
class TritonSettings:
    """The choices of a deployment; none changes results.

    Attributes:
        max_batch_size: sequences in one run of the graph.
        max_sequences: sequences a model instance holds at once, each with a cache of CacheMetadata.row_bytes.
        instances: copies of the model, on the CPU or on each GPU.
        idle_seconds: a sequence without a request for so long is dropped.
        op_library: path, on the server, of the custom-op library; None runs the graph's own function of
            standard operators.
    """

    max_batch_size: int = 8
    max_sequences: int = 32
    instances: int = 1
    idle_seconds: int = 60
    op_library: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_sequences", "instances", "idle_seconds"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise GsrqError(f"triton.{name}: {getattr(self, name)} is not in 1 .. {1 << 20}", "use 1 or more")
        if self.max_sequences < self.max_batch_size:
            raise GsrqError(
                f"triton.max_sequences: {self.max_sequences} is below max_batch_size {self.max_batch_size}",
                "allow at least as many sequences as fit a batch",
            )
        if self.op_library is not None:
            check_library(self.op_library, "triton.op_library")


def write_triton_repository(artifact_dir: Path, name: str, settings: TritonSettings | None = None) -> Path:
    """Write ``triton/onnxruntime/<name>/`` into an artifact: config.pbtxt and version 1 of the model.

    The model's files are hard links to the artifact's own (copies where the file system has none), and read-only.

    Args:
        artifact_dir: holds model.onnx and its external data.
        name: the model's name on the server.
    Returns:
        the model's directory.
    Raises:
        GsrqError: a bad name, or one that is there already.
        ArtifactError: model.onnx is missing, is not ours, or its data lies outside the directory.
    """
    check_name(name)
    model = load_graph(artifact_dir / "model.onnx")
    config = triton_config(model, name, settings or TritonSettings())
    files = model_files(artifact_dir)
    return link_files(artifact_dir, artifact_dir / "triton" / "onnxruntime" / name, files, {"config.pbtxt": config})


def triton_config(model: onnx.ModelProto, name: str, settings: TritonSettings) -> str:
    """config.pbtxt in full: nothing is left to Triton's auto-completion.

    Raises:
        ArtifactError: the graph's inputs and outputs are not those of its metadata.
    """
    instances = f"instance_group [\n  {{\n    count: {settings.instances}\n    kind: KIND_CPU\n  }}\n]\n"
    config = sequence_config(model, name, settings, "onnxruntime", instances)
    if settings.op_library is not None:
        config += f'model_operations {{ op_library_filename: "{settings.op_library}" }}\n'
    return config


def sequence_config(model: onnx.ModelProto, name: str, settings: TritonSettings, backend: str, instances: str) -> str:
    """config.pbtxt of a backend that keeps implicit sequence state.

    Args:
        instances: the instance group's text.
    Raises:
        ArtifactError: the graph's inputs and outputs are not those of its metadata.
    """
    metadata = CacheMetadata.from_properties({p.key: p.value for p in model.metadata_props})
    inputs = {value.name: value for value in model.graph.input}
    outputs = {value.name: value for value in model.graph.output}
    states = [f"{i}.{part}" for i in range(len(metadata.layers)) for part in PARTS]
    if set(inputs) != {*INPUTS, *(f"past.{s}" for s in states)} or set(outputs) != {
        "logits",
        *(f"present.{s}" for s in states),
    }:
        raise ArtifactError(
            "model.onnx: its inputs and outputs are not those of its metadata", "build the artifact again"
        )
    return "".join(
        (
            f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: {settings.max_batch_size}\n',
            _section("input", [_tensor(inputs[i]) for i in INPUTS]),
            _section("output", [_tensor(outputs["logits"])]),
            _sequences(metadata, settings),
            instances,
            "version_policy { specific { versions: [ 1 ] } }\n",
        )
    )


def _tensor(value: onnx.ValueInfoProto) -> str:
    """An input or output without its batch dimension; -1 for what varies."""
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim][1:]
    if tensor.elem_type not in TYPES:
        raise ArtifactError(f"model.onnx: {value.name} has element type {tensor.elem_type}", "build the artifact again")
    lines = [f'name: "{value.name}"', f"data_type: {TYPES[tensor.elem_type]}"]
    lines += ["dims: [ 1 ]", "reshape { shape: [ ] }"] if value.name in VECTORS else [f"dims: {_list(dims)}"]
    return "\n".join(lines)


def _sequences(metadata: CacheMetadata, settings: TritonSettings) -> str:
    # Each run writes fresh output tensors that Triton then copies into the state, after the inputs were
    # read: so one buffer serves for both. Triton pairs inputs with outputs by their order when sorted by name;
    # the common prefixes keep it equal.
    states = []
    for layer in range(len(metadata.layers)):
        for part in PARTS:
            dims = _list(metadata.shape(layer, part, 1, metadata.full_capacity)[1:])
            kind = STATE_TYPES[metadata.dtype(part)]
            states.append(
                f'input_name: "past.{layer}.{part}"\noutput_name: "present.{layer}.{part}"\n'
                f"data_type: {kind}\ndims: {dims}\nuse_same_buffer_for_input_output: true\n"
                f'initial_state {{ name: "zero" data_type: {kind} dims: {dims} zero_data: true }}'
            )
    inner = (
        f"max_sequence_idle_microseconds: {settings.idle_seconds * 1_000_000}\n"
        f"oldest {{ max_candidate_sequences: {settings.max_sequences} }}\n" + _section("state", states)
    )
    return "sequence_batching {\n" + _indent(inner, 2) + "}\n"


def _section(name: str, items: list[str]) -> str:
    return f"{name} [\n" + ",\n".join("  {\n" + _indent(item + "\n", 4) + "  }" for item in items) + "\n]\n"


def _indent(text: str, by: int) -> str:
    return "".join(" " * by + line + "\n" for line in text.splitlines())


def _list(dims: list[int] | tuple[int, ...]) -> str:
    return "[ " + ", ".join(map(str, dims)) + " ]"

"""The Triton repository: its configuration as Triton's own protobuf reads it, its files as ONNX Runtime does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_artifact import MAX_LENGTH, RULE, tiny_artifact
from triton_schema import parsed

from gsrq_export import GsrqError
from gsrq_export.errors import ArtifactError
from gsrq_export.export import triton_files
from gsrq_export.export.triton import TritonSettings, write_triton_repository
from gsrq_export.runtime.session import OrtModel

KINDS = {"float16": "TYPE_FP16", "int8": "TYPE_INT8"}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    source = tiny_artifact("Qwen3", False, torch.float16).path
    return Path(shutil.copytree(source, tmp_path / "artifact"))


def test_configuration_is_complete(artifact: Path) -> None:
    settings = TritonSettings(4, 9, 2, 30, "/opt/gsrq/libgsrq_ort.so")
    config, proto = parsed(write_triton_repository(artifact, "demo-1bit", settings))

    def kind(value: int) -> str:
        return str(proto.DataType.Name(value))

    assert (config.name, config.backend, config.max_batch_size) == ("demo-1bit", "onnxruntime", 4)
    inputs = {i.name: (kind(i.data_type), list(i.dims)) for i in config.input}
    assert inputs == {
        "input_ids": ("TYPE_INT64", [-1]),
        "past_lengths": ("TYPE_INT64", [1]),
        "new_lengths": ("TYPE_INT64", [1]),
        "logit_indices": ("TYPE_INT64", [-1]),
    }
    reshaped = [i.name for i in config.input if i.HasField("reshape")]
    assert reshaped == ["past_lengths", "new_lengths"]
    assert all(not i.reshape.shape for i in config.input)
    assert [(o.name, kind(o.data_type), list(o.dims)) for o in config.output] == [("logits", "TYPE_FP32", [-1, 97])]

    batching = config.sequence_batching
    assert batching.max_sequence_idle_microseconds == 30_000_000
    assert batching.oldest.max_candidate_sequences == 9
    capacity = RULE.coded(MAX_LENGTH)
    exact = ("TYPE_FP16", [2, RULE.exact_slots, 24])
    expected = {
        f"{layer}.{part}": shape
        for layer in range(2)
        for part, shape in (
            ("key_codes", ("TYPE_INT8", [capacity, 3])),
            ("value_codes", ("TYPE_INT8", [capacity, 4])),
            ("key_exact", exact),
            ("value_exact", exact),
        )
    }
    assert {s.input_name: (kind(s.data_type), list(s.dims)) for s in batching.state} == {
        f"past.{name}": shape for name, shape in expected.items()
    }
    for state in batching.state:
        assert state.output_name == state.input_name.replace("past.", "present.")
        assert state.use_same_buffer_for_input_output
        (initial,) = state.initial_state
        assert initial.name
        assert (initial.data_type, list(initial.dims), initial.zero_data) == (state.data_type, list(state.dims), True)
    # Triton pairs a state's input and output by their places among the sorted names.
    by_input, by_output = (sorted(getattr(s, f) for s in batching.state) for f in ("input_name", "output_name"))
    assert [n.replace("past.", "present.") for n in by_input] == by_output

    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, proto.ModelInstanceGroup.KIND_CPU)
    assert list(config.version_policy.specific.versions) == [1]
    assert list(config.model_operations.op_library_filename) == ["/opt/gsrq/libgsrq_ort.so"]

    names = {v.name for v in onnx.load(str(artifact / "model.onnx"), load_external_data=False).graph.input}
    assert names == {*inputs, *(s.input_name for s in batching.state)}


def test_no_library_is_named_when_none_is_given(artifact: Path) -> None:
    config, _ = parsed(write_triton_repository(artifact, "plain"))
    assert not config.HasField("model_operations")


def test_files_are_linked_and_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.onnx", "model.onnx.data", "codebooks.safetensors"}
    linked = write_triton_repository(artifact, "linked") / "1"
    assert {p.name for p in linked.iterdir()} == files
    assert all((linked / name).samefile(artifact / name) for name in files)

    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(triton_files.os, "link", no_links)
    copied = write_triton_repository(artifact, "copied") / "1"
    for name in files:
        assert not (copied / name).samefile(artifact / name)
        assert (copied / name).read_bytes() == (artifact / name).read_bytes()

    prompt = [[3 + i % 90 for i in range(40)]]
    expected = OrtModel(artifact, library=None).prefill(prompt)
    for version in (linked, copied):
        np.testing.assert_array_equal(OrtModel(version, library=None).prefill(prompt), expected)


def test_a_sequence_as_triton_runs_it(artifact: Path) -> None:
    """States of the declared shapes, zero at first, outputs copied back, a client that counts: as OrtModel."""
    import onnxruntime as ort

    directory = write_triton_repository(artifact, "served")
    config, _ = parsed(directory)
    session = ort.InferenceSession(str(directory / "1" / "model.onnx"))
    numpy_types = {6: np.int8, 10: np.float16}  # TYPE_INT8, TYPE_FP16
    states = {s.input_name: np.zeros((1, *s.dims), numpy_types[s.data_type]) for s in config.sequence_batching.state}
    outputs = ["logits", *(s.output_name for s in config.sequence_batching.state)]
    model = OrtModel(artifact, library=None)
    prompt = [5 + i % 80 for i in range(33)]
    expected = [model.prefill([prompt])] + [model.step([t]) for t in range(40, 60)]
    sent = 0
    for i, tokens in enumerate([prompt, *([t] for t in range(40, 60))]):
        got = session.run(
            outputs,
            {
                "input_ids": np.array([tokens]),
                "past_lengths": np.array([sent]),
                "new_lengths": np.array([len(tokens)]),
                "logit_indices": np.array([[len(tokens) - 1]]),
                **states,
            },
        )
        sent += len(tokens)
        for (name, old), new in zip(states.items(), got[1:], strict=True):
            assert new.shape == old.shape
            states[name] = new
        np.testing.assert_allclose(got[0][:, 0], expected[i], atol=1e-3)


def test_refusals(artifact: Path, tmp_path: Path) -> None:
    for name in ("", "../up", "a b", "-x", 'x"', "a/b", "x" * 65):
        with pytest.raises(GsrqError, match="triton name"):
            write_triton_repository(artifact, name)
    assert not (artifact / "triton").exists()
    for values, message in (
        ({"max_batch_size": 0}, "triton.max_batch_size: 0"),
        ({"max_batch_size": 8, "max_sequences": 4}, "triton.max_sequences: 4 is below max_batch_size 8"),
        ({"op_library": 'x" } evil'}, "triton.op_library"),
    ):
        with pytest.raises(GsrqError, match=message):
            TritonSettings(**values)
    write_triton_repository(artifact, "twice")
    with pytest.raises(GsrqError, match="twice exists"):
        write_triton_repository(artifact, "twice")
    with pytest.raises(ArtifactError, match=r"model\.onnx does not exist"):
        write_triton_repository(tmp_path, "x")

    model = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    (artifact / "codebooks.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"codebooks\.safetensors does not exist"):
        write_triton_repository(artifact, "x")
    for escape in ("../secret", "/etc/passwd", "a/../../b", "..\\b"):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = escape
        (artifact / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match="outside the artifact"):
            write_triton_repository(artifact, "x")
    (artifact / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ArtifactError, match="is not an ONNX model"):
        write_triton_repository(artifact, "x")
    assert not (artifact / "triton" / "onnxruntime" / "x").exists()

"""An artifact exported for TensorRT, as far as that goes without it: graph, commands, configuration, plans' records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from triton_schema import parsed

from gsrq_export import GsrqError, native
from gsrq_export.commands.app import cli
from gsrq_export.errors import ArtifactError
from gsrq_export.export.tensorrt import SCRIPT, SETTINGS, Limits, export_tensorrt, tensorrt_graph
from gsrq_export.export.tensorrt_plan import (
    RECORD,
    PlanEnvironment,
    check_plan,
    environment,
    find_tensorrt,
    libraries,
    record,
)
from gsrq_export.export.triton import TritonSettings
from gsrq_export.runtime.session import OrtModel

GOLDEN = Path(__file__).parent.parent / "golden" / "1.1" / "artifact"
LENGTH, CAPACITY = 48, 42  # of the golden artifact


@pytest.fixture(scope="session")
def library() -> Path:
    """Found or built before any test looks elsewhere."""
    return native.ensure()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "artifact"))


@pytest.fixture
def exported(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With files in the libraries' place: nothing here loads them."""
    for target in (native.TENSORRT[10], native.CUDA):
        file = tmp_path / target.library
        file.write_bytes(target.library.encode())
        monkeypatch.setenv(target.variable, str(file))
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    out = tmp_path / "out"
    export_tensorrt(artifact, out, Limits(4, 24), TritonSettings(4, 9, 2), "served")
    return out


def test_the_graph_names_the_plugin_and_has_no_function(exported: Path, artifact: Path, tmp_path: Path) -> None:
    before = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False)
    assert before.functions
    assert not graph.functions
    found = 0
    for old, new in zip(before.graph.node, graph.graph.node, strict=True):
        if new.op_type == "GsrqAttention":
            found += 1
            added = {a.name: onnx.helper.get_attribute_value(a) for a in new.attribute[len(old.attribute) :]}
            assert added == {"plugin_version": b"1", "plugin_namespace": b"ai.gsrq"}
            del new.attribute[len(old.attribute) :]
        assert new == old
    assert found == 1
    assert graph.graph.initializer == before.graph.initializer
    assert tensorrt_graph(before) == onnx.load(str(exported / "model.onnx"), load_external_data=False)
    assert before.functions, "the graph given is left as it is"

    plain = tmp_path / "plain"  # the checker takes hard links for an attack
    plain.mkdir()
    for name in ("model.onnx", "model.onnx.data", "codebooks.safetensors"):
        shutil.copyfile(exported / name, plain / name)
    onnx.checker.check_model(str(plain / "model.onnx"))
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(str(plain / "model.onnx")), check_type=True, strict_mode=True
    )
    known = {v.name: v.type.tensor_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    unknown = [n.name for n in inferred.graph.node for o in n.output if o not in known or not known[o].elem_type]
    assert not unknown
    assert [d.dim_param or d.dim_value for d in known["logits"].shape.dim] == ["batch", "outputs", 257]


def test_it_computes_what_the_artifact_does(library: Path, exported: Path, artifact: Path) -> None:
    """In ONNX Runtime with its own library of the operator, as a graph without the function needs one."""
    expected, got = OrtModel(artifact, library=library), OrtModel(exported, library=library)
    prompt = [[(7 * i) % 256 for i in range(30)]]
    np.testing.assert_array_equal(got.prefill(prompt), expected.prefill(prompt))
    np.testing.assert_array_equal(got.step([5]), expected.step([5]))


def test_weights_are_linked_and_the_artifact_is_as_before(exported: Path, artifact: Path) -> None:
    for name in ("model.onnx.data", "codebooks.safetensors"):
        assert (exported / name).samefile(artifact / name)
    for path in (p.relative_to(GOLDEN) for p in GOLDEN.rglob("*") if p.is_file()):
        assert (artifact / path).read_bytes() == (GOLDEN / path).read_bytes()
    assert not list(exported.parent.glob(".out*"))


def test_profiles_and_the_command(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run with a program in trtexec's place that writes down what it is given."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tools / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(exported / SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)

    words = run().stdout.splitlines()
    plan = "triton/served/1/model.plan"
    assert words[:5] == [
        "--onnx=model.onnx",
        "--stronglyTyped",
        "--staticPlugins=lib/libgsrq_tensorrt10.so",
        "--skipInference",
        f"--saveEngine={plan}",
    ]
    in_place = run("--in-place").stdout.splitlines()
    assert in_place[3] == "--preview=+aliasedPluginIO1003"
    assert in_place[5] == "--saveEngine=in_place.plan"
    assert in_place[6:] == words[5:]

    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False).graph
    stored = json.loads((exported / SETTINGS).read_text())
    assert stored["plan"] == plan
    assert (exported / plan).parent.is_dir()
    seen = []
    for number in range(2):
        start = words.index(f"--profile={number}")
        shapes: dict[str, list[list[int]]] = {}
        for word, kind in zip(words[start + 1 : start + 4], ("min", "opt", "max"), strict=True):
            assert word.startswith(f"--{kind}Shapes=")
            for item in word.split("=", 1)[1].split(","):
                name, dims = item.rsplit(":", 1)
                shapes.setdefault(name, []).append([int(d) for d in dims.split("x")])
        assert shapes == stored["profiles"][number]
        assert set(shapes) == {value.name for value in graph.input}
        for value in graph.input:
            free = [not d.HasField("dim_value") for d in value.type.tensor_type.shape.dim]
            fixed = [d.dim_value for d in value.type.tensor_type.shape.dim]
            for least, usual, most in zip(*shapes[value.name], strict=True):
                assert 1 <= least <= usual <= most
            for shape in shapes[value.name]:
                assert [f or d == want for d, want, f in zip(shape, fixed, free, strict=True)] == [True] * len(shape)
        seen.append((shapes["input_ids"], shapes["past.0.key_codes"][2], shapes["logit_indices"]))
    assert seen[0] == ([[1, 1], [1, 12], [4, 24]], [4, CAPACITY, 2], [[1, 1], [1, 1], [4, 1]])
    assert seen[1] == ([[1, 1], [4, 1], [4, 1]], [4, CAPACITY, 2], [[1, 1], [4, 1], [4, 1]])

    other = exported / "lib" / native.TENSORRT[11].library
    other.write_bytes(b"")
    assert run().returncode == 2
    monkeypatch.setenv("GSRQ_TENSORRT_PLUGIN", str(other))
    assert f"--staticPlugins={other}" in run().stdout


def test_triton_configuration(exported: Path, artifact: Path) -> None:
    config, proto = parsed(exported / "triton" / "served")
    assert (config.name, config.backend, config.max_batch_size) == ("served", "tensorrt", 4)
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, proto.ModelInstanceGroup.KIND_GPU)
    assert list(group.profile) == ["0", "1"]
    assert not config.HasField("model_operations")
    assert config.sequence_batching.oldest.max_candidate_sequences == 9
    states = {s.input_name: s for s in config.sequence_batching.state}
    assert set(states) == {f"past.0.{part}" for part in ("key_codes", "value_codes", "key_exact", "value_exact")}
    assert all(s.use_same_buffer_for_input_output and s.initial_state[0].zero_data for s in states.values())
    assert list(states["past.0.key_codes"].dims) == [CAPACITY, 2]
    assert states["past.0.key_codes"].data_type == proto.TYPE_INT8
    onnxruntime, _ = parsed(artifact / "triton" / "onnxruntime" / "golden")
    for part in ("input", "output"):
        assert getattr(config, part) == getattr(onnxruntime, part)
    assert config.sequence_batching.state == onnxruntime.sequence_batching.state


def test_refusals(exported: Path, artifact: Path, tmp_path: Path) -> None:
    settings, free = TritonSettings(), tmp_path / "free"
    with pytest.raises(GsrqError, match="is not an empty directory"):
        export_tensorrt(artifact, exported, Limits(), settings, "x")
    with pytest.raises(GsrqError, match="triton name"):
        export_tensorrt(artifact, free, Limits(), settings, "a b")
    with pytest.raises(GsrqError, match="max_tokens: 0"):
        Limits(8, 0)
    model = (artifact / "model.onnx").read_bytes()
    (artifact / "model.onnx").write_bytes(model.replace(b'"prefill": "coded"', b'"prefill": "exact"'))
    with pytest.raises(GsrqError, match="with exact prefill a prompt must be one call") as error:
        export_tensorrt(artifact, free, Limits(4, 24), settings, "x")
    assert f"--max-tokens {LENGTH}" in error.value.mend
    (artifact / "model.onnx").write_bytes(model[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx: truncated"):
        export_tensorrt(artifact, free, Limits(), settings, "x")
    with pytest.raises(GsrqError, match="has no node"):
        tensorrt_graph(onnx.ModelProto())
    assert not free.exists()


def test_command(artifact: Path, tmp_path: Path) -> None:
    if find_tensorrt() is not None:
        pytest.skip("a full TensorRT is installed, which would build the plan")
    out = tmp_path / "made"
    given = ["export", "tensorrt", "--artifact", str(artifact), "--out", str(out)]
    refused = CliRunner().invoke(cli, [*given, "--build"])
    assert isinstance(refused.exception, GsrqError)
    assert "--build: the module tensorrt is missing" in str(refused.exception)
    assert not out.exists()
    result = CliRunner().invoke(cli, given)
    assert result.exit_code == 0, result.exception
    assert str(out / SCRIPT) in result.output
    assert f"--backend-config=tensorrt,plugins={out}" in result.output
    assert (out / "triton" / "artifact" / "config.pbtxt").is_file()


HERE = PlanEnvironment("10.16.1.11", "9.0", "a" * 64, "b" * 64)


def test_a_plan_is_held_to_its_record(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    with pytest.raises(ArtifactError, match=r"plan\.json beside it is missing"):
        check_plan(plan, HERE)
    record(plan, HERE)
    check_plan(plan, HERE)
    for name, value, said in (
        ("tensorrt", "10.16.1.12", r"TensorRT 10\.16\.1\.11, here is 10\.16\.1\.12"),
        ("compute_capability", "8.0", r"a GPU of compute capability 9\.0, here is 8\.0"),
        ("plugin_sha256", "c" * 64, "the plugin library with sha256 aaa"),
        ("kernels_sha256", "c" * 64, r"libgsrq_cuda\.so with sha256 bbb"),
    ):
        with pytest.raises(ArtifactError, match=said) as error:
            check_plan(plan, replace(HERE, **{name: value}))
        assert "gsrq export tensorrt --build" in error.value.mend
    with pytest.raises(ArtifactError, match=r"TensorRT 10.*; .*compute capability"):
        check_plan(plan, replace(HERE, tensorrt="11.4.0.106", compute_capability="10.0"))
    plan.write_bytes(b"other")
    with pytest.raises(ArtifactError, match="its sha256 differs"):
        check_plan(plan, HERE)
    for damage in ("", "{}", "[1]", "[" * 5000, json.dumps({"plan_sha256": 1}), "\udcff"):
        (tmp_path / RECORD).write_text(damage, errors="surrogateescape")
        with pytest.raises(ArtifactError, match="is damaged"):
            check_plan(plan, HERE)


def test_libraries_of_a_plan(exported: Path) -> None:
    plugin, kernels = libraries(exported, "10.16.1.11")
    assert plugin.read_bytes() == b"libgsrq_tensorrt10.so"
    assert kernels.read_bytes() == b"libgsrq_cuda.so"
    with pytest.raises(GsrqError, match=r"libgsrq_tensorrt11\.so is missing"):
        libraries(exported, "11.4.0.106")
    for version in ("8.6.1", "12.0", "odd"):
        with pytest.raises(GsrqError, match=f"TensorRT {version} has no plugin"):
            libraries(exported, version)
    if native.cuda_devices() == 0:
        with pytest.raises(GsrqError, match="there is no GPU 0"):
            environment(exported, "10.16.1.11")

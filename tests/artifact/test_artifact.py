"""A real exported model as an artifact: sound as made, and every kind of damage found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_artifact import tiny_artifact

from gsrq_export.artifact import publish as publishing
from gsrq_export.artifact.manifest import (
    MAX_MANIFEST_BYTES,
    CacheEntry,
    LayerEntry,
    Manifest,
    ModelEntry,
    SideEntry,
    TrafficEntry,
    load_manifest,
    make_manifest,
    save_manifest,
)
from gsrq_export.artifact.publish import check_destination, is_artifact, publish
from gsrq_export.artifact.verify import find_problems, verify_artifact
from gsrq_export.errors import ArtifactError
from gsrq_export.recipe import parse_recipe, resolved_yaml
from gsrq_export.stages.keys import file_hash

HASH = "0" * 64


def write(directory: Path) -> Manifest:
    """The manifest of a directory that holds tiny_artifact's files."""
    made = tiny_artifact()
    heads, head_dim = made.model.config.num_key_value_heads, made.model.config.head_dim
    layers = [
        LayerEntry(
            num_kv_heads=heads,
            head_dim=head_dim,
            keys=SideEntry(width=books.keys.width, stages=books.keys.stages),
            values=SideEntry(width=books.values.width, stages=books.values.stages),
        )
        for books in made.codebooks
    ]
    rule = made.rule
    manifest = make_manifest(
        directory,
        name="tiny",
        model=ModelEntry(id="tiny", weights_sha256=HASH),
        traffic=TrafficEntry(sha256=HASH, sequences=4, sequence_length=64),
        cache=CacheEntry(
            sinks=rule.sinks, window=rule.window, block=rule.block, exact_dtype="float32", prefill="coded", beam=1
        ),
        layers=layers,
        op_version=1,
        opset=23,
        libraries={"libgsrq.so": Path(__file__)},
    )
    save_manifest(directory, manifest)
    return manifest


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_artifact()
    directory = tmp_path_factory.mktemp("made") / "artifact"
    shutil.copytree(made.path, directory)
    rule = made.rule
    recipe = parse_recipe(
        f"name: tiny\nmodel: {{path: tiny/tiny}}\ncache: {{sinks: {rule.sinks}, window: {rule.window}, "
        f"block: {rule.block}, exact_dtype: float32}}\n",
        "tiny",
        directory,
    )
    (directory / "recipe.resolved.yaml").write_text(resolved_yaml(recipe))
    version = directory / "triton" / "tiny" / "1"
    version.mkdir(parents=True)
    for file in sorted(directory.iterdir()):
        if file.is_file():
            os.link(file, version / file.name)
    write(directory)
    return directory


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "artifact")


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rehash(directory: Path, name: str) -> None:
    """What an attacker who can write the artifact does: the manifest agrees with the file again."""
    path = directory / name
    entry = {"sha256": file_hash(path), "size": path.stat().st_size}
    edit_manifest(directory, lambda data: data["files"].update({name: entry}))


def refusal(directory: Path, deep: bool = True) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(directory, deep)
    return str(caught.value)


def test_sound(sound: Path) -> None:
    for deep in (True, False):
        assert find_problems(sound, deep) == []
    report = verify_artifact(sound)
    assert report.files == len([f for f in sound.rglob("*") if f.is_file()])
    assert report.size == sum(f.stat().st_size for f in sound.rglob("*") if f.is_file() and f.name != "manifest.json")
    manifest = report.manifest
    assert load_manifest(sound) == manifest
    assert manifest.schema_version == "1.2"
    assert json.loads((sound / "manifest.json").read_text())["schema"] == "1.2"
    assert manifest.libraries == {"libgsrq.so": file_hash(Path(__file__))}
    assert {"triton/tiny/1/model.onnx", "model.onnx", "codebooks.safetensors"} <= set(manifest.files)
    assert {"torch", "python", "onnx"} <= set(manifest.environment)


def test_equal_directories_have_equal_manifests(artifact: Path, sound: Path) -> None:
    write(artifact)
    assert (artifact / "manifest.json").read_bytes() == (sound / "manifest.json").read_bytes()


def test_flipped_byte_anywhere(artifact: Path) -> None:
    rng = np.random.default_rng(0)
    for name in sorted(load_manifest(artifact).files):
        path = artifact / name
        before = path.read_bytes()
        at = int(rng.integers(len(before)))
        path.write_bytes(before[:at] + bytes([before[at] ^ 1 << int(rng.integers(8))]) + before[at + 1 :])
        assert find_problems(artifact) == [f"{name}: its sha256 is not the manifest's; the file was changed"]
        path.write_bytes(before)
    assert find_problems(artifact) == []


def test_missing_extra_and_truncated_all_at_once(artifact: Path) -> None:
    (artifact / "model.onnx").unlink()
    (artifact / "triton" / "extra.so").write_bytes(b"\x7fELF")
    books = artifact / "codebooks.safetensors"
    books.write_bytes(books.read_bytes()[:-7])
    found = refusal(artifact, deep=False)
    assert "model.onnx: missing" in found
    assert "triton/extra.so: not in the manifest" in found
    assert f"codebooks.safetensors: truncated: {books.stat().st_size} bytes, the manifest says" in found


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -2])
def test_truncated_codebooks_that_the_manifest_agrees_with(artifact: Path, keep: int) -> None:
    books = artifact / "codebooks.safetensors"
    books.write_bytes(books.read_bytes()[:keep])
    rehash(artifact, "codebooks.safetensors")
    found = refusal(artifact, deep=False)
    assert "codebooks.safetensors: " in found
    assert "safetensors" in found.split(": ", 3)[2] or "outside the file" in found


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def replace_header(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "codebooks.safetensors"
    header, body = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    rehash(artifact, "codebooks.safetensors")


NAME = "layers.0.key.codewords"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda h: h[NAME].update(shape=[1, 10**6, 256, 10**6]), "is not F16"),
        (lambda h: h[NAME].update(dtype="F64"), "is not F16"),
        (lambda h: h.pop(NAME), "1 tensors missing or unknown, such as layers.0.key.codewords"),
        (lambda h: h.update(other=h[NAME]), "such as other"),
        (lambda h: h[NAME].update(data_offsets=[0, 2]), "are not its"),
        (lambda h: h[NAME].update(data_offsets=[o + 10**9 for o in h[NAME]["data_offsets"]]), "outside the file"),
        (lambda h: h[NAME].update(data_offsets=["0", 2]), "its place in the file is not stated"),
        (lambda h: h[NAME].update(data_offsets=h["layers.1.key.codewords"]["data_offsets"]), "tensors overlap"),
    ],
)
def test_lying_headers(artifact: Path, change: Callable[[dict[str, Any]], object], what: str) -> None:
    replace_header(artifact, change)
    assert what in refusal(artifact, deep=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codewords_that_are_not_finite(artifact: Path, value: float) -> None:
    path = artifact / "codebooks.safetensors"
    header, _ = header_of(path)
    content = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(content[:8], "little") + header["layers.1.value.codewords"]["data_offsets"][1] - 2
    content[at : at + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    rehash(artifact, "codebooks.safetensors")
    assert "layers.1.value.codewords: 1 of" in refusal(artifact)
    assert "NaN or infinite" in refusal(artifact)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:x", "a//b", "./a", "", "a\0b", "a/.", "manifest.json"]
)
def test_names_that_leave_the_artifact(artifact: Path, name: str) -> None:
    edit_manifest(artifact, lambda data: data["files"].update({name: {"sha256": HASH, "size": 1}}))
    assert "is not a plain path inside the artifact" in refusal(artifact)


def test_symbolic_links(artifact: Path) -> None:
    path = artifact / "recipe.resolved.yaml"
    outside = artifact.parent / "outside.yaml"
    path.rename(outside)
    path.symlink_to(outside)
    assert "recipe.resolved.yaml is a symbolic link" in refusal(artifact)
    path.unlink()
    outside.rename(path)
    (artifact / "loop").symlink_to(artifact)
    assert "loop is a symbolic link" in refusal(artifact)
    (artifact / "loop").unlink()
    os.mkfifo(artifact / "pipe")
    assert "pipe is neither a file nor a directory" in refusal(artifact)


def external_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("location", "../../outside.bin", "leaves the artifact"),
        ("location", "/etc/passwd", "leaves the artifact"),
        ("location", "", "leaves the artifact"),
        ("location", "nothing.bin", "which the manifest does not list"),
        ("offset", "-4", "lie outside"),
        ("offset", str(10**12), "lie outside"),
        ("length", str(10**12), "lie outside"),
        ("length", "many", "is no number"),
    ],
)
@pytest.mark.parametrize("name", ["model.onnx", "triton/tiny/1/model.onnx"])
def test_external_data_that_leaves_the_artifact(artifact: Path, name: str, key: str, value: str, what: str) -> None:
    model = onnx.load(str(artifact / name), load_external_data=False)
    tensor = external_tensors(model)[-1]
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    (artifact / name).unlink()  # its hard link keeps the old content
    onnx.save(model, str(artifact / name))
    rehash(artifact, name)
    found = refusal(artifact, deep=False)
    assert f"{name}: {tensor.name}: " in found
    assert what in found


def test_external_data_hidden_in_a_subgraph(artifact: Path) -> None:
    path = artifact / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    hidden = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="../secret")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "inner", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    model.functions[0].node.append(node)
    path.unlink()
    onnx.save(model, str(path))
    rehash(artifact, "model.onnx")
    assert "hidden: external data at '../secret' leaves the artifact" in refusal(artifact)


def test_not_onnx_and_another_operator(artifact: Path) -> None:
    edit_manifest(artifact, lambda data: data.update(op_version=2))
    assert "model.onnx: operator ai.gsrq version 1, the manifest says 2" in refusal(artifact)
    edit_manifest(artifact, lambda data: data.update(op_version=1))
    (artifact / "model.onnx").write_bytes(b"\xff" * 100)
    rehash(artifact, "model.onnx")
    assert "model.onnx: not ONNX" in refusal(artifact)


def test_recipe_and_manifest_must_agree(artifact: Path) -> None:
    edit_manifest(artifact, lambda data: data["cache"].update(window=9))
    assert "recipe.resolved.yaml: its cache rule" in refusal(artifact)
    (artifact / "recipe.resolved.yaml").write_text("name: tiny\nmodle: x\n")
    rehash(artifact, "recipe.resolved.yaml")
    assert "did you mean 'model'?" in refusal(artifact)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d.update(schema="2.0"), "schema 2.0, this version reads 1.x\n  mend: install a newer gsrq-export"),
        (lambda d: d.update(schema="0.3"), "mend: build the artifact again"),
        (lambda d: d.update(schema=1), "schema 1 is no version"),
        (lambda d: d.pop("schema"), "schema None is no version"),
        (lambda d: d.update(more=1), "more: Extra inputs are not permitted"),
        (lambda d: d["model"].update(weights_sha256="0"), "model.weights_sha256: String should match"),
        (lambda d: d["cache"].update(block=0), "cache.block"),
        (lambda d: d.update(files={}), "files: "),
    ],
)
def test_manifest_faults(artifact: Path, change: Callable[[dict[str, Any]], object], what: str) -> None:
    edit_manifest(artifact, change)
    with pytest.raises(ArtifactError) as caught:
        load_manifest(artifact)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "later", "read"), [("1.0", "key_frame", "pre-rope"), ("1.1", "code_order", "token")]
)
def test_what_an_earlier_schema_lacks_is_read_as_it_was(artifact: Path, schema: str, later: str, read: str) -> None:
    edit_manifest(artifact, lambda d: (d.update(schema=schema), d["cache"].pop(later)))
    assert find_problems(artifact) == []
    assert getattr(load_manifest(artifact).cache, later) == read


def test_a_key_frame_that_the_codebooks_have_not(artifact: Path) -> None:
    edit_manifest(artifact, lambda d: d["cache"].update(key_frame="rotated"))
    found = refusal(artifact)
    assert "layers.0.key.center" in found
    assert "its cache rule" in found


def test_an_order_of_codes_that_the_graph_has_not(artifact: Path) -> None:
    edit_manifest(artifact, lambda d: d["cache"].update(code_order="head"))
    found = refusal(artifact)
    assert "orders codes by token, the manifest says head" in found
    assert "its cache rule" in found


def test_a_newer_minor_version_is_read(artifact: Path) -> None:
    edit_manifest(artifact, lambda d: (d.update(schema="1.7", more=1), d["model"].update(more=[2])))
    assert find_problems(artifact) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b" " * (MAX_MANIFEST_BYTES + 1), "over 4 MiB"),
        (b"{", "is not JSON"),
        (b'{"schema": "1.0", "schema": "1.0"}', "a key stands twice"),
        (b"\xff", "is not JSON"),
        (b"[" * 1_000_000, "is not JSON"),
        (b"[]", "schema None is no version"),
    ],
)
def test_manifest_that_is_none(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert any(what in problem for problem in find_problems(tmp_path))


def test_no_artifact_at_all(tmp_path: Path) -> None:
    assert "has no manifest.json" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "none")


@pytest.mark.parametrize("atomic", [True, False])
def test_publish_into_place_and_over_an_older_one(
    artifact: Path, sound: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        monkeypatch.setattr(publishing, "_exchange", lambda first, second: False)
    out = artifact.parent / "out" / "published"
    publish(artifact, out)
    assert find_problems(out) == []
    assert not artifact.exists()
    again = shutil.copytree(sound, artifact.parent / "again")
    edit_manifest(again, lambda d: d.update(name="newer"))
    publish(again, out)
    assert verify_artifact(out).manifest.name == "newer"
    assert [p.name for p in out.parent.iterdir()] == ["published"]
    assert not again.exists()


def test_an_artifact_that_another_build_put_there_at_this_moment(
    artifact: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the destination and the move."""
    out, other = artifact.parent / "out", shutil.copytree(sound, artifact.parent / "other")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == artifact:
            rename(other, target)
        return rename(self, target)

    edit_manifest(artifact, lambda d: d.update(name="last"))
    monkeypatch.setattr(Path, "rename", late)
    publish(artifact, out)
    assert verify_artifact(out).manifest.name == "last"
    assert not artifact.exists()


def test_the_old_artifact_stays_where_the_new_one_cannot_come(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = artifact.parent / "out"
    publish(shutil.copytree(artifact, artifact.parent / "old"), out)
    monkeypatch.setattr(publishing, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == artifact:
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(Exception, match="the disk is full"):
        publish(artifact, out)
    assert find_problems(out) == []
    assert artifact.exists()


def test_publish_refuses_what_is_not_an_artifact(artifact: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds files and is not an artifact"):
        publish(artifact, precious)
    (precious / "manifest.json").write_text('{"created_by": "someone", "schema": "1.0"}')  # not ours
    with pytest.raises(ArtifactError, match="is not an artifact"):
        check_destination(precious)
    assert (precious / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ArtifactError, match="is a file"):
        check_destination(precious / "thesis.tex")
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(ArtifactError, match="is a symbolic link"):
        check_destination(tmp_path / "link")
    with pytest.raises(ArtifactError, match=r"has no manifest.json yet"):
        publish(precious, tmp_path / "new")
    empty = tmp_path / "empty"
    empty.mkdir()
    publish(artifact, empty)
    assert is_artifact(empty)


def test_write_manifest_refuses_links(artifact: Path) -> None:
    (artifact / "link").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="link is a symbolic link"):
        write(artifact)

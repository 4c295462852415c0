"""Artifacts that earlier versions wrote, kept as they were written: this version verifies and runs every one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from families import ROOT

from gsrq_export import native
from gsrq_export.artifact.manifest import SCHEMA, load_manifest
from gsrq_export.artifact.verify import find_problems, verify_artifact
from gsrq_export.errors import ArtifactError
from gsrq_export.runtime.session import OrtModel

GOLDEN = ROOT / "tests" / "golden"
VERSIONS = sorted(path.parent.parent.name for path in GOLDEN.glob("*/artifact/manifest.json"))


def test_every_schema_version_has_one() -> None:
    assert [f"{SCHEMA[0]}.{minor}" for minor in range(SCHEMA[1] + 1)] == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_is_sound(version: str) -> None:
    assert find_problems(GOLDEN / version / "artifact") == []
    assert load_manifest(GOLDEN / version / "artifact").schema_version == version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("backend", ["onnx-function", "cpu-op"])
def test_runs_to_the_logits_it_had(version: str, backend: str) -> None:
    library = native.find() if backend == "cpu-op" else None
    if backend == "cpu-op" and library is None:
        pytest.skip("the custom-op library is not built: gsrq plugins build")
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    model, tokens = OrtModel(GOLDEN / version / "artifact", threads=1, library=library), expected["tokens"]
    logits = model.prefill([tokens[:-6]])
    for token in tokens[-6:]:
        logits = model.step([token])
    assert model.backend == backend
    assert model.lengths.tolist() == [len(tokens)]
    np.testing.assert_allclose(logits[0], expected["logits"], atol=1e-3)
    assert np.std(expected["logits"]) > 0.1


def with_schema(tmp_path: Path, schema: str) -> Path:
    artifact = shutil.copytree(GOLDEN / VERSIONS[0] / "artifact", tmp_path / "artifact")
    data = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**data, "schema": schema, "added_later": 1}))
    return artifact


@pytest.mark.parametrize(
    ("schema", "mend"),
    [(f"{SCHEMA[0] + 1}.0", "install a newer gsrq-export"), ("0.9", "build the artifact again from its recipe")],
)
def test_an_unknown_major_version_is_refused_with_what_to_do(tmp_path: Path, schema: str, mend: str) -> None:
    artifact = with_schema(tmp_path, schema)
    with pytest.raises(ArtifactError, match=f"schema {schema}, this version reads {SCHEMA[0]}.x") as caught:
        load_manifest(artifact)
    assert caught.value.mend == mend
    with pytest.raises(ArtifactError, match=schema):
        verify_artifact(artifact)


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    assert find_problems(with_schema(tmp_path, f"{SCHEMA[0]}.{SCHEMA[1] + 1}")) == []

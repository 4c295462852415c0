"""gsrq compare through the command line, and the benchmark script over the same harness."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from compare.constructed import comparison, evaluation, row
from families import ROOT, tiny_model
from traffic.byte_tokenizer import byte_tokenizer

from gsrq_export import GsrqError
from gsrq_export.baselines.calibrate import families
from gsrq_export.baselines.methods import registry
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.commands.app import cli
from gsrq_export.compare.schema import load_comparison, save_comparison
from gsrq_export.compare.subject import Ours

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "traffic": {"sources": [{"kind": "self"}], "sequences": 6, "sequence_length": 64},
    "codec": {"keys": {"width": 64, "stages": 2}, "values": {"width": 32, "stages": 1}, "iterations": 2, "beam": 2},
    "cache": {"sinks": 2, "window": 8, "block": 4},
    "export": {"max_length": 96},
    "evaluate": None,
}
FEW = ("--windows", 2, "--window-tokens", 48)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=2, head_dim=32, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
    model.save_pretrained(directory / "model")
    byte_tokenizer().save_pretrained(directory / "model")
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": {"path": str(directory / "model")}}))
    return path


def test_from_the_recipe_alone_and_again_with_more(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask = ("compare", "--recipe", recipe, "--out", out, *FEW)
    done = run(*ask, "--methods", "fp8,kivi-2", "--prefill", "both", "--prefix", 0.5)
    assert done.exit_code == 0, (done.output, done.exception)
    found = load_comparison(out / "compare.json")
    ids = ["ours", "ours-p0.5", "fp8"]
    assert [(r.id, r.prefill) for r in found.rows] == [(id, p) for id in ids for p in ("coded", "exact")]
    assert found.protocol.texts[0].name == "held-out"
    assert found.unquantized["exact"]["held-out"]["perplexity"]["prompt_tokens"] == 24
    assert [entry.id for entry in found.skipped] == ["kivi-2"], "blocks of 4 do not hold groups of 32"
    (trained,) = (tmp_path / "out.work").glob("codebooks-*/codebooks.safetensors")
    assert found.rows[0].setting == Ours("x", "x", load_codebooks(trained), 2).setting()
    text = (out / "compare.md").read_text()
    assert "## Prefill exact" in text
    assert "| ours | perplexity held-out |" in text

    again = run(*ask, "--methods", "fp8,int4", "--prefill", "coded")
    assert again.exit_code == 0, (again.output, again.exception)
    assert "codebooks: done before, kept" in again.stderr
    assert "ours, coded prefill" not in again.stderr
    rows = load_comparison(out / "compare.json").rows
    assert rows[:6] == found.rows
    assert [(r.id, r.prefill) for r in rows[6:]] == [("int4", "coded")]
    other = run(*ask[:-1], 40, "--methods", "fp8")
    assert isinstance(other.exception, GsrqError)
    assert "texts.0.settings.window_tokens is 48 there, 40 here" in other.exception.problem


def test_ours_from_an_artifact_and_texts_by_name(recipe: Path, tmp_path: Path) -> None:
    artifact, work = tmp_path / "artifact", tmp_path / "artifact.work"
    assert run("build", "--recipe", recipe, "--out", artifact).exit_code == 0
    texts = []
    for name in ("first", "second"):
        (tmp_path / name).write_text(f"It was the {name} of times. " * 30)
        texts += ["--text", f"{name}={tmp_path / name}"]
    ask = ("compare", "--recipe", recipe, "--artifact", artifact, "--work", work, "--methods", "int4", *FEW, *texts)
    done = run(*ask, "--out", tmp_path / "out", "--at", "131072x1")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "traffic: done before, kept" in done.stderr
    found = load_comparison(tmp_path / "out" / "compare.json")
    assert [row.id for row in found.rows] == ["ours", "int4"]
    assert list(found.rows[0].metrics) == ["first", "second"]
    codebooks = load_codebooks(artifact / "codebooks.safetensors")
    assert found.rows[0].setting == Ours("x", "x", codebooks, 2).setting()
    assert "effective bits at 131072x1" in (tmp_path / "out" / "compare.md").read_text()

    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["model"]["weights_sha256"] = "0" * 64
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    refused = run(*ask, "--out", tmp_path / "other")
    assert isinstance(refused.exception, GsrqError)
    assert "was built from weights 000" in refused.exception.problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "kivi2"), "method 'kivi2' is unknown"),
        (("--device", "tpu:7"), "--device tpu:7: "),
        (("--text", "novels.txt"), "--text novels.txt: not NAME=FILE"),
        (("--text", "a=/none.txt"), "--text /none.txt: "),
        (("--artifact", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    recipe: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    result = run("compare", "--recipe", recipe, "--out", tmp_path / "out", *options)
    assert isinstance(result.exception, GsrqError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The benchmark script, run in this process as its own command would be."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run_script(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks/baselines.py"), run_name="__main__")

    return run_script


def test_parts_of_the_benchmark_are_merged(recipe: Path, tmp_path: Path, script: Callable[..., None]) -> None:
    text = tmp_path / "text"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    ask = ["--model", recipe.parent / "model", "--calibration", text, "--evaluation", f"a={text}", "--device", "cpu"]
    ask += ["--methods", "fp8", "int4", "turboquant-2", "--sequences", 2, "--length", 500, "--windows", 2]
    ask += ["--window-tokens", 60, "--lengths", "--sinks", 2, "--window", 8, "--block", 4]
    files = [tmp_path / f"part{i}.json" for i in range(2)]
    for i, file in enumerate(files):
        script(*ask, "--part", f"{i}/2", "--out", file)
    assert all(load_comparison(file).rows for file in files)
    script("--merge", *files, "--out", tmp_path / "all.json")
    assert {row.id for row in load_comparison(tmp_path / "all.json").rows} == {"fp8", "int4", "turboquant-2"}
    assert "turboquant-2" in (tmp_path / "all.md").read_text()
    save_comparison(files[1], comparison([row("cq", 1.0, evaluation([1.0, 2.0]))], evaluation([1.0, 2.0])))
    with pytest.raises(SystemExit, match=r"is of another protocol: model\.id is m there"):
        script("--merge", *files, "--out", tmp_path / "never.json")
    assert not (tmp_path / "never.json").exists()
    with pytest.raises(SystemExit, match=r"--part 2/2: not i/n with 0 <= i < n"):
        script(*ask, "--part", "2/2", "--out", tmp_path / "never.json")


def test_parts_are_whole_trainings_and_nothing_is_lost(script: Callable[..., None]) -> None:
    part_of = runpy.run_path(str(ROOT / "benchmarks/baselines.py"))["part_of"]
    methods = registry()
    parts = [part_of(methods, f"{i}/4") for i in range(4)]
    assert sorted(id for part in parts for id in part) == sorted(methods)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for family in families(list(methods.values())):
        assert sum(any(method in part.values() for method in family) for part in parts) == 1

"""gsrq regress on the trained demo model: a sound artifact, and each way of not being one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from demo import demo_directory, demo_text

from gsrq_export.artifact.manifest import load_manifest, make_manifest, save_manifest
from gsrq_export.codec.storage import tensor_locations
from gsrq_export.commands.build import build
from gsrq_export.commands.regress import regress
from gsrq_export.errors import GsrqError

RECIPE = {
    "name": "gated",
    "traffic": {"sources": [{"kind": "self"}], "sequences": 16, "sequence_length": 256},
    "codec": {
        **{"method": "kmeans", "weights": "none", "metric": "none", "iterations": 2},
        **{"keys": {"width": 16, "stages": 10}, "values": {"width": 16, "stages": 3}},
    },
    "cache": {"sinks": 4, "window": 32, "block": 16},
    "export": {"max_length": 256},
    "evaluate": None,
}
MEASURE = ("--windows", 10, "--window-tokens", 180, "--length", 200, "--cases", 24, "--threads", 1)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(regress, [str(a) for a in arguments])


class Bench:
    """An accepted artifact with its baseline and text."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.artifact, self.text, self.baseline = (directory / n for n in ("artifact", "text.txt", "baseline.json"))

    def record(self, *more: object, out: str = "baseline.json") -> Result:
        model = ("--model", demo_directory(), "--out", self.directory / out)
        return run("record", "--artifact", self.artifact, "--text", self.text, *model, *MEASURE, *more)

    def check(
        self, *more: object, artifact: Path | None = None, baseline: Path | None = None, text: Path | None = None
    ) -> Result:
        return run(
            *("check", "--artifact", artifact or self.artifact, "--baseline", baseline or self.baseline),
            *("--text", text or self.text, "--threads", 1, *more),
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    found = Bench(tmp_path_factory.mktemp("gate"))
    recipe = found.directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": {"path": str(demo_directory())}}))
    made = CliRunner().invoke(build, ["--recipe", str(recipe), "--out", str(found.artifact)])
    assert made.exit_code == 0, made.exception
    found.text.write_text(demo_text(), "utf-8")
    result = found.record("--max-recall-loss", 0.4, "--max-perplexity-increase", 0.1)
    assert result.exit_code == 0, (result.output, result.exception)
    return found


def broken(bench: Bench, to: Path, damage: Callable[[Path], None], manifest: bool = True) -> Path:
    """A copy with something changed, and a manifest that says so: only its figures give it away."""
    shutil.copytree(bench.artifact, to)
    old = load_manifest(to)
    damage(to)
    if manifest:
        fields = ("name", "model", "traffic", "cache", "layers", "op_version", "opset")
        save_manifest(to, make_manifest(to, **{name: getattr(old, name) for name in fields}))
    return to


def overwrite(path: Path, offset: int, data: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data.tobytes())


def replace_codewords(artifact: Path) -> None:
    """Random ones, ten times too large: at their own size the encoder would still find useful sums of them."""
    path, rng = artifact / "codebooks.safetensors", np.random.default_rng(0)
    for name, (offset, length) in tensor_locations(path).items():
        if name.endswith("codewords"):
            words = np.fromfile(path, np.float16, length // 2, offset=offset).astype(np.float32)
            overwrite(path, offset, (rng.normal(size=words.size) * 10 * words.std()).astype(np.float16))


def poison_weights(artifact: Path) -> None:
    path = artifact / "model.onnx.data"
    weights = np.fromfile(path, np.float32)
    weights[:: len(weights) // 5000] = np.nan
    overwrite(path, 0, weights)


def outcome(result: Result) -> str:
    found = re.search(r"verdict: (\w+)", result.output)
    assert found, (result.output, result.exception)
    return found[1]


def test_sound_artifact_is_accepted(bench: Bench, tmp_path: Path) -> None:
    junit, summary = tmp_path / "out/junit.xml", tmp_path / "out/summary.md"
    result = bench.check("--junit", junit, "--markdown", summary)
    assert (result.exit_code, outcome(result)) == (0, "ACCEPT"), result.output
    suite = ET.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("8", "0", "0")
    case = next(c for c in suite.findall("testcase") if c.get("name") == "perplexity-against-accepted")
    figures = {p.get("name"): p.get("value") for p in case.findall("properties/property")}
    assert float(str(figures["value"])) == pytest.approx(0.0, abs=1e-6), "the accepted artifact against itself"
    assert summary.read_text("utf-8").startswith("## ✅ gsrq regress: ACCEPT")
    data = json.loads(bench.baseline.read_text())
    assert len(data["exact"]["window_nll"]) == 10
    assert data["exact"]["recall"][0]["hits"].count("1") >= 18
    assert data["gates"]["max_recall_loss"] == 0.4


def test_damaged_codebooks_are_a_regression(bench: Bench, tmp_path: Path) -> None:
    artifact, junit = broken(bench, tmp_path / "broken", replace_codewords), tmp_path / "junit.xml"
    result = bench.check("--junit", junit, artifact=artifact)
    assert (result.exit_code, outcome(result)) == (1, "REGRESSION"), result.output
    failures = [
        case.get("name") for case in ET.parse(junit).getroot().iter("testcase") if case.find("failure") is not None
    ]
    assert failures == [
        *("perplexity-recovery", "perplexity-against-accepted", "recall-recovery-200", "recall-against-accepted-200"),
    ]


def test_stricter_limits_on_the_command_line(bench: Bench) -> None:
    result = bench.check("--max-recall-loss", 0.02)
    assert (result.exit_code, outcome(result)) == (4, "INCOMPLETE")
    assert "too few cases to tell" in result.output


def test_an_artifact_that_is_the_exact_run_is_anomalous(bench: Bench, tmp_path: Path) -> None:
    data = json.loads(bench.baseline.read_text())
    data["exact"]["window_nll"] = data["accepted"]["window_nll"]
    (tmp_path / "b.json").write_text(json.dumps(data))
    result = bench.check(baseline=tmp_path / "b.json")
    assert (result.exit_code, outcome(result)) == (3, "ANOMALOUS")
    assert "codes are claimed, and nothing shows them" in result.output


def test_nan_is_incomplete(bench: Bench, tmp_path: Path) -> None:
    artifact, junit = broken(bench, tmp_path / "nan", poison_weights), tmp_path / "junit.xml"
    result = bench.check("--junit", junit, artifact=artifact)
    assert (result.exit_code, outcome(result)) == (4, "INCOMPLETE")
    assert "token likelihoods are NaN or infinite" in result.output
    error = ET.parse(junit).getroot().find(".//testcase[@name='evaluation']/error")
    assert error is not None
    assert error.get("type") == "INCOMPLETE"


def test_what_cannot_be_compared_is_incomplete(bench: Bench, tmp_path: Path) -> None:
    """None of these runs the model."""
    text = bench.baseline.read_text()
    data = json.loads(text)

    def baseline(change: Callable[[dict[str, object]], object]) -> Path:
        copy = json.loads(text)
        change(copy)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(copy))
        return path

    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    (tmp_path / "other.txt").write_text(bench.text.read_text("utf-8") + "!", "utf-8")
    unsound = broken(bench, tmp_path / "unsound", replace_codewords, manifest=False)
    settings = data["settings"]
    for name, arguments, message in (
        ("baseline", {"baseline": tmp_path / "half.json"}, "is not JSON"),
        ("text", {"text": tmp_path / "other.txt"}, "the baseline was recorded on"),
        ("artifact", {"artifact": unsound}, r"codebooks\.safetensors: its sha256 is not the manifest's"),
        (
            "artifact",
            {"baseline": baseline(lambda d: d.update(weights_sha256="1" * 64))},
            "the artifact was built from a model with weights",
        ),
        (
            "settings",
            {"baseline": baseline(lambda d: d.update(settings={**settings, "seed": 1}))},
            "give other windows or cases than the baseline's",
        ),
        (
            "settings",
            {"baseline": baseline(lambda d: d.update(settings={**settings, "prefill": "exact"}))},
            "prefill is coded, the baseline's exact",
        ),
        (
            "settings",
            {"baseline": baseline(lambda d: d.update(settings={**settings, "window_tokens": 300}))},
            "measures 300 tokens, the artifact takes 256",
        ),
        (
            "baseline",
            {"baseline": baseline(lambda d: d.update(settings={**settings, "windows": 9}))},
            "exact has 10 windows, settings say 9",
        ),
        ("baseline", {"baseline": baseline(lambda d: d.update(schema="0.9"))}, "schema '0.9'"),
    ):
        result = bench.check(**arguments)
        assert (result.exit_code, outcome(result)) == (4, "INCOMPLETE"), message
        assert re.search(rf"(?m)^{name}: ", result.output), result.output
        assert re.search(message, result.output), result.output


def test_bad_usage_is_not_a_verdict(bench: Bench, tmp_path: Path) -> None:
    for result, message in (
        (bench.check(artifact=tmp_path / "none"), "--artifact .*none does not exist"),
        (bench.check("--confidence", 1.5), r"gates\.confidence: 1\.5 is out of range"),
        (bench.record("--cases", 9, out="no.json"), "9 cannot show a loss of at most 0.05 .*even if none is lost"),
        (bench.record("--windows", 5, "--no-recall", out="no.json"), "5 windows are too few"),
        (bench.record("--window-tokens", 50, "--no-recall", out="no.json"), "end before the first block is coded"),
        (bench.record("--length", 500, out="no.json"), "500 tokens exceed the artifact's 256"),
    ):
        assert isinstance(result.exception, GsrqError), result.output
        assert re.search(rf"(?s){message}", str(result.exception))
    assert not (bench.directory / "no.json").exists()


def test_an_artifact_that_fails_its_gates_is_not_recorded(bench: Bench) -> None:
    result = bench.record("--no-recall", "--max-perplexity-increase", 1e-6, out="no.json")
    assert result.exit_code in (1, 4)
    assert "is not written" in result.stderr
    assert not (bench.directory / "no.json").exists()

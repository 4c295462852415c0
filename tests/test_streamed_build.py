"""`gsrq build` on a model whose weights are streamed: the artifact of one in memory, or a refusal before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from checkpoints import write_checkpoint
from click.testing import CliRunner, Result

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.build.source import Source
from gsrq_export.build.streaming import Residence
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import load_recipe

RECIPE: dict[str, Any] = {
    "name": "streamed",
    "traffic": {"sources": [{"kind": "text", "path": "text.txt"}], "sequences": 24, "sequence_length": 64},
    "capture": {"vectors": 1100, "seed": 5},
    "codec": {
        "keys": {"width": 32, "stages": 2},
        "values": {"width": 16, "stages": 1},
        "iterations": 1,
        "metric": "attention",
        "key_frame": "rotated",
    },
    "cache": {"sinks": 2, "window": 8, "block": 4},
    "export": {"max_length": 96},
    "evaluate": None,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed")
    write_checkpoint("Qwen3", path / "model", num_hidden_layers=1, head_dim=16)
    (path / "text.txt").write_text("".join(f"Line {i} of a text about nothing, {i * i} words.\n" for i in range(400)))
    return path


def recipe(directory: Path, streaming: str, **changes: Any) -> Path:
    path = directory / f"{streaming}.yaml"
    model = {"path": str(directory / "model"), "streaming": streaming}
    path.write_text(yaml.safe_dump({**RECIPE, "model": model, **changes}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def refusal(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, GsrqError)
    return str(error)


def test_the_artifact_is_the_same(directory: Path) -> None:
    files = {}
    for streaming in ("never", "always"):
        out = directory / f"artifact-{streaming}"
        result = run("build", "--recipe", recipe(directory, streaming), "--out", out)
        assert result.exit_code == 0, (result.output, result.exception)
        files[streaming] = {
            name: entry.sha256
            for name, entry in load_manifest(out).files.items()
            if name not in ("recipe.resolved.yaml", "report.html")  # they name the option, the paths
        }
    assert files["never"] == files["always"]
    assert run("verify", "--artifact", directory / "artifact-always").exit_code == 0


def test_what_needs_the_whole_model_is_refused(directory: Path) -> None:
    asked = recipe(
        directory,
        "always",
        traffic={**RECIPE["traffic"], "sources": [*RECIPE["traffic"]["sources"], {"kind": "self"}]},
        codec={**RECIPE["codec"], "finetune": {"steps": 3}},
        evaluate={"perplexity": {"length": 64}},
    )
    out = directory / "refused"
    for more in ((), ("--dry-run",)):
        error = refusal("build", "--recipe", asked, "--out", out, *more)
        for part in (
            "3 problems",
            "traffic.sources.1.kind = 'self': needs the whole model in memory, and it is streamed",
            "give text (kind: jsonl or text), or set model.streaming: auto",
            "codec.finetune = {'steps': 3",
            "evaluate = {",
            "write evaluate: null",
        ):
            assert part in error
    assert sorted(p.name for p in directory.glob("refused*")) == []
    plain = recipe(directory, "always")
    error = refusal("tune", "--recipe", plain, "--bits", 2, "--context", 64, "--out", directory / "tuned.yaml")
    assert "model.streaming = 'always': gsrq tune needs the whole model in memory" in error
    error = refusal("compare", "--recipe", plain, "--out", directory / "compared")
    assert "gsrq compare needs the whole model in memory" in error
    planned = run("build", "--recipe", plain, "--out", out, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "weights    streamed, a layer at a time: " in planned.output


def test_auto_streams_what_does_not_fit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_recipe(recipe(directory, "auto"))
    needed = Source(given).residence.needed
    with torch.no_grad():
        assert needed == 4 * sum(p.numel() for p in Source(given).model.parameters())
    for available, streamed in ((10 * needed, False), (needed, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=available: _Memory(free))
        found = Source(given).residence
        assert (found.streamed, found.mode) == (streamed, "auto")
        assert next(Source(given).model.parameters()).is_meta == streamed
    monkeypatch.setattr(psutil, "virtual_memory", lambda: _Memory(2 * needed))
    for processes, streamed in ((1, False), (2, True)):  # on this machine, as torchrun says
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert Source(given).residence.streamed == streamed
    never = load_recipe(recipe(directory, "never"))
    assert not Source(never).residence.streamed
    assert "needs" not in str(Residence(True, "auto", 10**10, 10**9))
    text = recipe(directory, "auto", evaluate={"perplexity": {"length": 64}})
    error = refusal("build", "--recipe", text, "--out", directory / "refused")
    assert "write evaluate: null, or use a machine with" in error


class _Memory:
    def __init__(self, available: int) -> None:
        self.available = available

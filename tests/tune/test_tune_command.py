"""gsrq tune, end to end, on the demo model with little of everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from demo import demo_directory

from gsrq_export.accounting import LayerShape, footprint
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import load_recipe
from gsrq_export.tune.settings import EFFORTS, Effort

SHAPES = [LayerShape(2, 64)] * 6


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "small.yaml"
    data = {
        "name": "small",
        "model": {"path": str(demo_directory())},
        "traffic": {"sequences": 8, "sequence_length": 128, "recall_share": 0.5},
        "codec": {"keys": {"width": 64, "stages": 4}, "metric": "attention"},
        "cache": {"sinks": 2, "window": 16, "block": 8, "code_order": "head"},
        "export": {"max_length": 512},
        "evaluate": None,
    }
    path.write_text(yaml.safe_dump(data))
    return path


def tune(recipe: Path, out: Path, *more: object) -> Result:
    return run("tune", "--recipe", recipe, "--context", 512, "--sequences", 512, "--out", out, *more)


def test_a_tuned_recipe_meets_the_target_and_is_not_worse_than_uniform(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", Effort(rows=600, iterations=1, rungs=3, sensed=1, compared=1))
    out = tmp_path / "tuned.yaml"
    result = tune(recipe, out, "--bits", 1.0)
    assert result.exit_code == 0, result.exception
    tuned = load_recipe(out)
    size = footprint(tuned, SHAPES, 512, 512)
    assert 0.9 < size.effective_bits <= 1.0
    given = load_recipe(recipe)
    assert (tuned.traffic, tuned.cache.code_order) == (given.traffic, given.cache.code_order)
    assert "Takes" in out.read_text().splitlines()[1]

    data = json.loads(out.with_suffix(".json").read_text())
    assert data["best"]["bytes"]["total"] == size.total
    assert all(data["best"]["measured"]["loss"] <= c["measured"]["loss"] for c in data["uniform"] + data["tuned"])
    assert all(c["bytes"]["total"] <= data["target"]["bytes"] for c in data["uniform"] + data["tuned"])
    assert all(p["tuned"]["bytes"]["total"] <= p["uniform"]["bytes"]["total"] for p in data["curve"])
    split = data["split"]
    assert sorted(split["train"] + split["sensed"] + split["compared"]) == list(range(8))
    assert len({(c["sinks"], c["window"]) for c in data["tuned"]}) > 3
    page = out.with_suffix(".html").read_text()
    assert "<svg" in page
    assert page.count(f"<td>{data['best']['bytes']['total']:,}</td>") == 1, "the budget kept is listed once"

    shown = run("build", "--recipe", out, "--out", tmp_path / "artifact", "--dry-run")
    assert shown.exit_code == 0, shown.exception
    # The dry run states one sequence; its codebooks are the ones that 512 sequences share here.
    alone = footprint(tuned, SHAPES, 512)
    assert f"{alone.effective_bits:.2f}" in shown.output
    assert alone.per_sequence * 512 + alone.codebooks == size.total

    memory = f"{data['target']['bytes']}B"
    again = tune(recipe, tmp_path / "again.yaml", "--memory", memory, "--work", tmp_path / "tuned.yaml.work")
    assert again.stderr.count("done before, kept") == 4
    assert (tmp_path / "again.yaml").read_text() == out.read_text()


def test_what_cannot_be_is_refused_before_any_work(recipe: Path, tmp_path: Path) -> None:
    for more, message in (
        (("--bits", 0.1), "can be reached"),
        (("--memory", "1TB"), "can be reached"),
        (("--memory", "much"), "is not a size"),
        ((), "give one of the two"),
        (("--bits", 1.2, "--context", 4096), "over the recipe's export.max_length"),
        (("--bits", 1.2, "--context", 24), "nothing is coded"),
    ):
        result = tune(recipe, tmp_path / "out.yaml", *more)
        assert isinstance(result.exception, GsrqError)
        assert message in str(result.exception)
    assert isinstance(tune(recipe, tmp_path / "out.json", "--bits", 1.2).exception, GsrqError)
    assert list(tmp_path.iterdir()) == []

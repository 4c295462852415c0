"""The recipes that come along: against the models' published configurations, and end to end on tiny models."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_builds
import torch
import yaml
from click.testing import CliRunner, Result
from families import ROOT
from published_configs import PUBLISHED
from transformers import AutoConfig, PreTrainedModel

from gsrq_export.accounting import footprint, token_bytes
from gsrq_export.build.source import Source, check_stated
from gsrq_export.build.tiny import tiny_recipe
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.model.architecture import architecture_of
from gsrq_export.model.loading import load_model
from gsrq_export.recipe import CodecSide, LayerBudget, Recipe, load_recipe
from gsrq_export.recipe_files import bundled_recipes, find_recipe
from gsrq_export.runtime.session import OrtModel

Builds = dict[str, tuple[Path, "Future[tuple[int, str, float]]"]]
OWN = {"demo", "recall-28m"}  # models of the project itself
NAMES = sorted(PUBLISHED)
# One of each architecture and kind of rotary table; the others differ in sizes.
BUILT = ["gemma-2-9b", "llama-3.1-8b", "mistral-7b-v0.1", "phi-3-mini-128k", "qwen2.5-7b", "qwen3-8b"]


def config_of(name: str, **changes: Any) -> Any:
    fields = copy.deepcopy({**PUBLISHED[name][1], **changes})  # transformers writes into what it is given
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_every_recipe_is_held_to_a_published_configuration() -> None:
    assert {file.stem for file in bundled_recipes()} - OWN == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_architecture_is_the_published_one(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    model, _ = PUBLISHED[name]
    assert (recipe.name, recipe.model.path) == (name, model)
    config = config_of(name)
    assert recipe.model.architecture == architecture_of(config)
    assert recipe.model.architecture is not None
    recipe.model.architecture.check_model(config, name)
    check_stated(recipe)
    assert recipe.export.max_length == min(config.max_position_embeddings, 131072)
    assert recipe.nominal_bits == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 32}, "num_key_value_heads is 32 in the model and 8 in the recipe"),
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0 in the model and 500000.0 in the recipe"),
        ({"rope_scaling": None}, "rope_scaling is None in the model and RopeScaling"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    architecture = load_recipe(find_recipe("llama-3.1-8b")).model.architecture
    assert architecture is not None
    with pytest.raises(GsrqError, match=r"point model\.path") as caught:
        architecture.check_model(config_of("llama-3.1-8b", **changes), "r")
    assert message in str(caught.value)


def test_show_states_what_the_accounting_counts() -> None:
    for name in ("llama-3-8b", "phi-3-mini-4k"):
        recipe = load_recipe(find_recipe(name))
        shapes = Source(recipe).stated_shapes()
        shown = run("recipes", "show", name).output
        assert f"{token_bytes(recipe, shapes):,} bytes coded" in shown
        size = footprint(recipe, shapes, recipe.export.max_length)
        row = next(line for line in shown.splitlines() if line.startswith(f"{recipe.export.max_length:>7} "))
        assert [int(cell.replace(",", "")) for cell in row.split()[1:4]] == [
            size.fp16,
            size.fp16 // 2,
            size.per_sequence,
        ]
        assert float(row.split()[4]) == pytest.approx(size.effective_bits, abs=0.01)
        assert f"codebooks  {size.codebooks:,} bytes" in shown
    # 2 * 8 heads * 128 elements * 2 bytes * 32 layers, and a sixteenth of it.
    listed = run("recipes", "list").output
    assert "model meta-llama/Meta-Llama-3-8B; 8,192 bytes a token, bf16 131,072" in listed
    assert "one-bit" not in listed, "units are no recipes"


def test_a_recipe_that_its_own_architecture_cannot_follow(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"extends: [{ROOT}/recipes/llama-3-8b.yaml]\nexport: {{max_length: 9000}}\n")
    for command in (("show", file), ("validate", "--no-model", file)):
        result = run("recipes", *command)
        assert isinstance(result.exception, GsrqError)
        assert "export.max_length = 9000: the model has 8192 positions" in str(result.exception)


@pytest.mark.parametrize("name", sorted({*NAMES, *OWN}))
def test_recipes_that_come_along_order_codes_by_head(name: str) -> None:
    assert load_recipe(find_recipe(name)).cache.code_order == "head"


# Composition.


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory / "r.yaml"


def test_later_files_take_precedence(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        a="codec: {beam: 2, tau: 3, keys: {width: 64, stages: 1}}\ncache: {sinks: 1}\n",
        b="extends: [a.yaml]\ncodec: {beam: 3, keys: {stages: 2}}\n",
        c="cache: {window: 8}\ntraffic: {sources: [{kind: text, path: /x}]}\n",
        r="extends: [b.yaml, c.yaml]\nname: r\nmodel: {path: o/m}\ncodec: {tau: 4}\n"
        "traffic: {sources: [{kind: self}]}\n",
    )
    recipe = load_recipe(file)
    assert (recipe.codec.beam, recipe.codec.tau) == (3, 4)
    assert (recipe.codec.keys.width, recipe.codec.keys.stages) == (64, 2)
    assert (recipe.cache.sinks, recipe.cache.window) == (1, 8)
    assert [source.kind for source in recipe.traffic.sources] == ["self"]


def test_units_that_come_along_can_be_extended_from_anywhere(tmp_path: Path) -> None:
    file = write(tmp_path, r="extends: [units/one-bit.yaml]\nname: r\nmodel: {path: o/m}\n")
    assert load_recipe(file).codec.keys.stages == 20


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"r": "extends: [a.yaml]\nname: r\n", "a": "extends: [r.yaml]\n"}, "a file extends itself: r.yaml -> a.yaml"),
        ({"r": "extends: [none.yaml]\nname: r\n"}, "there is no file none.yaml"),
        ({"r": "extends: a.yaml\nname: r\n", "a": ""}, "extends = 'a.yaml': is not a list of files"),
        ({"r": "extends: []\nname: r\n"}, r"extends = \[\]: is not a list"),
        ({"r": "extends: [a.yaml]\nname: r\nmodel: {path: x}\n", "a": "codek: {}\n"}, "codek.*did you mean 'codec'"),
        ({"r": "extends: [a.yaml]\nname: r\n", "a": "[1]"}, "holds list, not keys and values"),
    ],
)
def test_faults_of_composition(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(GsrqError, match=rf"(?s){message}"):
        load_recipe(write(tmp_path, **files))


def test_files_that_extend_too_deeply(tmp_path: Path) -> None:
    chain = {f"f{i}": f"extends: [f{i + 1}.yaml]\n" for i in range(20)}
    with pytest.raises(GsrqError, match="more than 8 files extend each other"):
        load_recipe(write(tmp_path, **chain, r="extends: [f0.yaml]\nname: r\n"))


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(GsrqError, match=r"(?s)no recipe of that name.*demo, gemma-2-9b"):
        find_recipe("llama-4")


# Tiny models.


@pytest.fixture(scope="session")
def builds(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Builds]:
    """Two at a time."""
    directory = tmp_path_factory.mktemp("recipes")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {name: (directory / name, pool.submit(tiny_builds.build, name, str(directory / name))) for name in BUILT}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_builds_end_to_end_on_a_tiny_model(name: str, builds: Builds) -> None:
    out, future = builds[name]
    status, output, _ = future.result()
    assert status == 0, output
    assert run("verify", "--artifact", out).exit_code == 0
    given = load_recipe(find_recipe(name))
    architecture = given.model.architecture
    assert architecture is not None
    built = yaml.safe_load((out / "recipe.resolved.yaml").read_text())
    assert built["name"] == f"{name}-tiny"
    data = json.loads(run("inspect", "--artifact", out, "--json").output)
    # What the recipe asks of codec and cache is what was built, at the same bits to half a stage.
    metrics = data["metrics"]
    for kind in ("key", "value"):
        side = built["codec"][f"{kind}s"]
        half = 4 / side["width"] + 1e-9
        assert metrics[f"{kind}_bits"] == pytest.approx(8 * side["stages"] / side["width"])
        assert metrics[f"{kind}_bits"] == pytest.approx(given.codec.side(kind, 0).nominal_bits, abs=half)
    assert {**built["cache"]} == given.cache.model_dump(mode="json")
    for field in ("method", "metric", "beam", "refits", "codewords"):
        assert built["codec"][field] == getattr(given.codec, field)
    assert metrics["coded"]["perplexity"]["perplexity"] > 1
    # The model is one of the architecture, with its kinds of layers, caps and scalings.
    model, tokenizer = load_model(Path(built["model"]["path"]))
    published = config_of(name)
    assert model.config.model_type == published.model_type
    kinds = getattr(published, "layer_types", None)
    assert set(getattr(model.config, "layer_types", None) or []) == set(kinds or [])
    scaling = published.rope_parameters["rope_type"]
    assert model.config.rope_parameters["rope_type"] == scaling
    for field in ("attn_logit_softcapping", "final_logit_softcapping", "tie_word_embeddings"):
        assert getattr(model.config, field, None) == getattr(published, field, None)
    assert (getattr(model.config, "sliding_window", None) is None) == (architecture.sliding_window is None)
    # As long as nothing is coded, the exported graph's logits are the model's.
    session = OrtModel(out)
    length = given.cache.rule.sinks + given.cache.rule.window + given.cache.rule.block - 1
    ids = np.random.default_rng(0).integers(1, len(tokenizer) - 1, length)
    with torch.no_grad():
        exact = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    session.reset(1)
    found = session.append([ids.tolist()])[0]
    # Measured 0.0007 to 0.0015, of float16 exact slots; Gemma-2 and Mistral without their windows would give 0.2 and 1.
    assert np.linalg.norm(found - exact) <= 4e-3 * np.linalg.norm(exact)


def test_tiny_from_a_models_own_configuration(tmp_path: Path) -> None:
    """A recipe that states no architecture takes its model's config.json; a dry run writes nothing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((ROOT / "assets/demo-6m/config.json").read_text())
    (tmp_path / "r.yaml").write_text(f"extends: [demo.yaml]\nmodel: {{path: {model}}}\n")
    before = sorted(tmp_path.rglob("*"))
    result = run("build", "--recipe", tmp_path / "r.yaml", "--tiny", "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "2 layers, 2 KV heads of 16" in result.output
    assert "1 nominal bits" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-3-8b", {"model_type": "nonsense"}, "no model of type nonsense can be drawn"),
        ("qwen2.5-7b", {"sliding_window": 4096}, "would differ in sliding_window"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe(name))
    assert recipe.model.architecture is not None
    architecture = recipe.model.architecture.model_copy(update=changes)
    model = recipe.model.model_copy(update={"architecture": architecture})
    with pytest.raises(GsrqError, match=message):
        tiny_recipe(recipe.model_copy(update={"model": model}), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_sub_vectors_over_many_heads_keep_them(tmp_path: Path) -> None:
    """All eight heads in one sub-vector, and a layer with a budget of its own."""
    recipe = load_recipe(find_recipe("llama-3-8b"))
    codec = recipe.codec.model_copy(
        update={
            "keys": CodecSide(width=1024, stages=64),
            "layers": (
                LayerBudget(layer=1, values=CodecSide(width=32, stages=4)),
                LayerBudget(layer=9, keys=CodecSide(width=64, stages=8)),
            ),
        }
    )
    tiny = tiny_recipe(recipe.model_copy(update={"codec": codec}), tmp_path)
    assert tiny.model.architecture is not None
    assert tiny.model.architecture.kv_shape == (8, 32)
    assert tiny.codec.keys == CodecSide(width=256, stages=16)
    assert [(b.layer, b.keys, b.values) for b in tiny.codec.layers] == [(1, None, CodecSide(width=8, stages=1))]
    check_stated(tiny)


def test_a_model_that_another_build_draws_at_this_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(find_recipe("llama-3-8b"))
    save = PreTrainedModel.save_pretrained

    def late(self: PreTrainedModel, directory: Path, **more: Any) -> None:
        save(self, directory, **more)
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
        other.append(tiny_recipe(recipe, tmp_path))

    other: list[Recipe] = []
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", late)
    assert [tiny_recipe(recipe, tmp_path)] == other
    (drawn,) = tmp_path.iterdir()
    assert str(drawn) == other[0].model.path
    check_stated(other[0])

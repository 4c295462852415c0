"""Recipes: strictness, messages, round trip, agreement with a model, and the numbers they promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from gsrq_export.accounting import LayerShape, effective_bits, footprint
from gsrq_export.cache.reference import LayerCache
from gsrq_export.codec.codebook import Codebook
from gsrq_export.errors import GsrqError
from gsrq_export.recipe import Recipe, check_against, load_recipe, parse_recipe, resolved_yaml

BASE = "name: demo\nmodel: {path: org/some-model}\n"


def parse(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml", Path("/nowhere"))


def message(text: str) -> str:
    with pytest.raises(GsrqError) as caught:
        parse(text)
    return str(caught.value)


def test_defaults_and_round_trip() -> None:
    recipe = parse(
        BASE + "traffic:\n  sources:\n  - {kind: self, temperature: 0.7}\n  - {kind: text, path: /x/*.txt, share: 2}\n"
        "evaluate: {recall: {lengths: [512, 1024], cases: 3}, text: {kind: jsonl, path: /x/y.jsonl}}\n"
        "codec: {keys: {width: 256, stages: 24}, tau: 2}\n"
    )
    assert recipe.codec.values.nominal_bits == 1.0
    assert recipe.nominal_bits == pytest.approx((0.75 + 1) / 2)
    assert recipe.model.path == "org/some-model"
    assert recipe.cache.code_order == "token"  # what recipes of earlier artifacts, which do not say, mean
    text = resolved_yaml(recipe)
    assert parse(text) == recipe
    assert resolved_yaml(parse(text)) == text
    with pytest.raises(ValidationError, match="frozen"):
        recipe.codec.beam = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("codec: {keys: {widht: 64}}", ["codec.keys.widht = 64", "unknown key", "did you mean 'width'?"]),
        ("traffic: {sources: [{kind: self, temprature: 1}]}", ["traffic.sources.0.temprature", "'temperature'"]),
        ("evaluate: {text: {kind: jsonl, pth: x}}", ["evaluate.text.pth", "'path'", "evaluate.text.path"]),
        ("traffic: {sources: [{kind: jsnol, path: x}]}", ["traffic.sources.0.kind = 'jsnol'", "'jsonl'"]),
        ("traffic: {sources: [{path: x}]}", ["traffic.sources.0.kind", "self, jsonl, text, stdin"]),
        ("traffic: {sources: []}", ["traffic.sources = "]),
        ("traffic: {sources: [{kind: jsonl}]}", ["traffic.sources.0.path", "is missing"]),
        ("codec: {method: gksm}", ["codec.method = 'gksm'", "did you mean 'gskm'?", "kmeans-spherical"]),
        ("codec: {beam: '4'}", ["codec.beam = '4'", "is str", "a whole number"]),
        ("codec: {beam: 257}", ["codec.beam = 257", "less than or equal to 256"]),
        ("codec: {beam: 0}", ["codec.beam = 0", "greater than or equal to 1"]),
        ("codec: {tau: 1e-3}", ["codec.tau = '1e-3'", "1.0e-3"]),
        ("codec: {key_frame: post-rope}", ["codec.key_frame = 'post-rope'", "pre-rope", "rotated"]),
        ("codec: {tau: .nan}", ["codec.tau = nan", "finite"]),
        ("codec: 3", ["codec = 3", "keys and values"]),
        ("cache: {sinks: -1}", ["cache.sinks = -1"]),
        ("cache: {code_order: heads}", ["cache.code_order = 'heads'", "did you mean 'head'?", "token"]),
        (
            "cache: {code_order: head, block: 12}",
            ["cache.block = 12", "cache.code_order: head", "a multiple of 8, or code_order: token"],
        ),
        ("cache: {window: 2000}", ["cache.window = 2000", "nothing is ever coded", "export.max_length 2048"]),
        (
            "triton: {max_batch_size: 8, max_sequences: 4}",
            ["triton.max_sequences = 4", "below triton.max_batch_size, 8"],
        ),
        ("triton: {op_library: 'x\" }'}", ["triton.op_library"]),
        ("traffic: {sequences: 1, sequence_length: 100}", ["traffic.sequences = 1", "100 tokens", "256 codewords"]),
        ("evaluate: {recall: {lengths: [64, 4096]}}", ["evaluate.recall.lengths.1 = 4096", "export.max_length"]),
        (
            "evaluate: {tasks: {names: [multi-kye]}}",
            ["evaluate.tasks.names.0 = 'multi-kye'", "'multi-key'?"],
        ),
        ("evaluate: {tasks: {names: []}}", ["evaluate.tasks.names = "]),
        ("evaluate: {tasks: {lengths: [64]}}", ["evaluate.tasks.names", "is missing"]),
        (
            "evaluate: {tasks: {names: [multi-key], lengths: [64, 4096]}}",
            ["evaluate.tasks.lengths.1 = 4096", "export.max_length"],
        ),
        ("evaluate: {fidelity: {prompts: 0}}", ["evaluate.fidelity.prompts = 0"]),
        ("evaluate: {fidelity: {new_tokens: 1800}}", ["evaluate.fidelity", "2312", "over export.max_length 2048"]),
        ("traffic: {sources: [{kind: stdin}, {kind: stdin}]}", ["stdin can be read only once"]),
        ("codec: {beam: 1}\ncodec: {beam: 2}", ["r.yaml:4:1", "'codec' stands twice", "line 3"]),
        ("codec: {keys: {width: 8, width: 9}}", ["'width' stands twice"]),
        ("codec: [", ["r.yaml:", "correct the YAML"]),
        ("x: !!python/object:os.system {}", ["r.yaml:3:4", "could not determine a constructor"]),
        ("3: x", ["key 3 is not a word"]),
    ],
)
def test_faults_name_field_value_and_mend(text: str, expected: list[str]) -> None:
    found = message(BASE + text)
    for part in expected:
        assert part in found


def test_all_faults_in_one_error() -> None:
    found = message("nmae: demo\nmodel: {path: 3}\ncodec: {beam: 0, method: x}\nexport: {max_length: true}\n")
    assert "6 problems" in found
    for part in (
        "nmae = 'demo'",
        "did you mean 'name'?",
        "\n  name = ",
        "model.path = 3",
        "codec.beam",
        "codec.method",
    ):
        assert part in found
    assert "export.max_length = True: is bool" in found


@pytest.mark.parametrize("text", ["", "- a", "just text", "name: Demo Model\nmodel: {path: x}"])
def test_not_a_recipe(text: str) -> None:
    assert "r.yaml" in message(text)


def test_paths_start_at_the_recipe_then_at_the_assets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("text")
    (tmp_path / "m").mkdir()
    file = tmp_path / "r.yaml"
    file.write_text("name: a\nmodel: {path: m}\ntraffic: {sources: [{kind: text, path: 'data/*.txt'}]}\n")
    recipe = load_recipe(file)
    assert recipe.model.path == str(tmp_path / "m")
    assert recipe.traffic.sources[0].path == str(tmp_path / "data/*.txt")  # type: ignore[union-attr]


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(GsrqError, match=r"cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"name: \xff")
    with pytest.raises(GsrqError, match="not UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_check_against_a_model() -> None:
    def recipe(width: int, **export: int) -> Recipe:
        return parse(BASE + f"codec: {{keys: {{width: {width}}}, values: {{width: 8}}}}\n")

    for width in (8, 24, 48, 96, 192, 384):
        check_against(recipe(width), [(8, 48)], 4096)
    for width in (5, 32, 36, 144, 768):
        with pytest.raises(GsrqError) as caught:
            check_against(recipe(width), [(8, 48)], 4096)
        assert f"codec.keys.width = {width}" in str(caught.value)
        assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96, 192, 384" in str(caught.value)
    with pytest.raises(GsrqError) as caught:
        check_against(recipe(24), [(8, 48)], 512)
    assert "export.max_length = 2048: the model has 512 positions" in str(caught.value)
    assert "traffic.sequence_length = 1024" in str(caught.value)


@pytest.mark.parametrize("frame", ["pre-rope", "rotated"])
def test_footprint_is_what_the_cache_allocates(frame: str) -> None:
    recipe = parse(
        BASE + "cache: {sinks: 3, window: 20, block: 8}\n"
        f"codec: {{key_frame: {frame}, keys: {{width: 32, stages: 3}}, values: {{width: 16, stages: 2}}}}\n"
    )
    rule, layers = recipe.cache.rule, [LayerShape(2, 32), LayerShape(4, 16), LayerShape(2, 32)]
    for n, batch in ((1, 1), (31, 2), (1000, 3)):
        codes = exact = books = 0
        for layer in layers:
            sides = [
                Codebook(
                    torch.zeros(layer.elements // s.width, s.stages, 256, s.width, dtype=torch.float16),
                    torch.zeros(layer.elements // s.width, s.width, s.width),
                )
                for s in (recipe.codec.keys, recipe.codec.values)
            ]
            if frame == "rotated":
                sides[0] = replace(sides[0], center=torch.zeros(layer.elements))
            cache = LayerCache.empty(batch, rule.coded(n), layer.num_kv_heads, layer.head_dim, *sides, rule)
            codes += cache.key_codes.nbytes + cache.value_codes.nbytes
            exact += cache.key_exact.nbytes + cache.value_exact.nbytes
            books += sum(side.stored_bytes for side in sides)
        found = footprint(recipe, layers, n, batch)
        assert (found.codes, found.exact, found.codebooks) == (codes, exact, books)
        assert found.effective_bits == pytest.approx(16 / found.compression)
    # Far out only the codes are left.
    assert effective_bits(recipe, layers, 10**9) == pytest.approx(recipe.nominal_bits, rel=1e-3)
    assert effective_bits(recipe, layers, 1) > 16
    with pytest.raises(ValueError, match="context 0"):
        footprint(recipe, layers, 0)

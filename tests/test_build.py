"""The main job end to end, through the command line, on a tiny random model with a tokenizer of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from families import ROOT, tiny_model
from traffic.byte_tokenizer import byte_tokenizer
from transformers import LlamaForCausalLM

from gsrq_export import CacheRule, coded
from gsrq_export.cache.rule import to_token_order
from gsrq_export.codec.int8 import KEY_SPREAD, stage_integers
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.perplexity import perplexity
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.runtime.session import OrtModel

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"path": "model"},
    "traffic": {"sources": [{"kind": "self"}], "sequences": 6, "sequence_length": 64},
    "codec": {"keys": {"width": 64, "stages": 2}, "values": {"width": 32, "stages": 1}, "iterations": 2},
    "cache": {"sinks": 2, "window": 8, "block": 4},
    "export": {"max_length": 96},
    "evaluate": {"perplexity": {"sequences": 2, "length": 64}},
}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=2, head_dim=32, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write(directory: Path, model: Path, changes: dict[str, Any] | None = None) -> Path:
    recipe = {**RECIPE, "model": {"path": str(model)}, **(changes or {})}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)


def build(recipe: Path, out: Path, *more: object, stdin: str | None = None) -> Result:
    return run("build", "--recipe", recipe, "--out", out, *more, stdin=stdin)


@pytest.fixture(scope="session")
def built(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    result = build(write(directory, model_dir), directory / "artifact")
    assert result.exit_code == 0, (result.output, result.exception)
    return directory / "artifact"


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_the_artifact_is_complete_and_sound(built: Path) -> None:
    assert run("verify", "--artifact", built).exit_code == 0
    for name in ("model.onnx", "codebooks.safetensors", "recipe.resolved.yaml", "metrics.json", "report.html"):
        assert (built / name).is_file()
    assert (built / "triton/onnxruntime/tiny/config.pbtxt").is_file()
    assert (built / "triton/python/tiny/1/model.py").is_file()
    shown = run("inspect", "--artifact", built).output
    assert "bits       0.25 nominal" in shown
    data = json.loads(run("inspect", "--artifact", built, "--json").output)
    assert data["metrics"]["coded"]["perplexity"]["perplexity"] > 1
    assert data["manifest"]["layers"][0]["keys"] == {"width": 64, "stages": 2}
    assert data["manifest"]["environment"]["device"] == "cpu"
    profiles = data["metrics"]["profile"]
    assert [(p["layer"], p["kind"]) for p in profiles] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    assert [len(p["profile"]["by_stage"]) for p in profiles] == [2, 1, 2, 1]
    # Training logged the greedy error of the same rows in the same metric, sub-vector by sub-vector.
    key, trained = profiles[0]["profile"], data["metrics"]["distortion"][0]
    assert key["vectors"] == 6 * 64 // 16
    assert key["metric_by_stage"] == pytest.approx(trained["relative_mse_by_stage"], rel=1e-4)


@pytest.fixture(scope="session")
def refined(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with everything that a recipe can ask of the codec and its evaluation beyond the defaults."""
    directory = tmp_path_factory.mktemp("refined")
    changes = {
        "codec": {
            **RECIPE["codec"],
            "metric": "attention",
            "beam": 2,
            "refits": 1,
            "codewords": "int8",
            "layers": [{"layer": 1, "keys": {"width": 32, "stages": 3}}],
            "finetune": {"steps": 3, "batch": 1, "learning_rate": 0.01},
        },
        "evaluate": {
            **RECIPE["evaluate"],
            "compare": {"methods": ["fp8", "kivi-1", "cq-8c8b"], "prefixes": [0.5]},
        },
        "cache": {"sinks": 2, "window": 16, "block": 32},
    }
    result = build(write(directory, model_dir, changes), directory / "artifact")
    assert result.exit_code == 0, (result.output, result.exception)
    return directory / "artifact"


SIDES = ("keys", "values")


def test_budgets_refits_and_fine_tuning_reach_the_artifact(refined: Path) -> None:
    assert run("verify", "--artifact", refined).exit_code == 0
    data = json.loads(run("inspect", "--artifact", refined, "--json").output)
    keys = [layer["keys"] for layer in data["manifest"]["layers"]]
    assert keys == [{"width": 64, "stages": 2}, {"width": 32, "stages": 3}]
    books = load_codebooks(refined / "codebooks.safetensors")
    assert [tuple(book.keys.codewords.shape) for book in books] == [(1, 2, 256, 64), (2, 3, 256, 32)]
    # 0.25 and 0.75 bits of keys, 0.25 of values twice.
    assert data["metrics"]["nominal_bits"] == pytest.approx((0.25 + 0.75 + 2 * 0.25) / 4)
    work = refined.with_name("artifact.work")
    stages = ("codebooks", "finetune", "int8")
    (before,), (after,), (last,) = (list(work.glob(f"{stage}-*/codebooks.safetensors")) for stage in stages)
    log = json.loads((after.parent / "finetune.json").read_text())
    assert log["steps"][-1] == 3
    improved = min(log["held_out_kl"]) < log["held_out_kl"][0]
    pairs = zip(load_codebooks(before), load_codebooks(after), strict=True)
    same = all(torch.equal(getattr(a, side).codewords, getattr(b, side).codewords) for a, b in pairs for side in SIDES)
    assert same is not improved  # of values: a zero may lose its sign
    assert (refined / "codebooks.safetensors").read_bytes() != after.read_bytes()
    for one, other in zip(books, load_codebooks(last), strict=True):
        assert torch.equal(one.keys.codewords, other.keys.codewords)
        assert torch.equal(one.values.codewords, other.values.codewords)
    for one, other in zip(books, load_codebooks(after), strict=True):
        integers, exponents = stage_integers(one.keys, KEY_SPREAD)
        units = torch.exp2(exponents.float())[None, :, None, None]
        assert float((integers * units - other.keys.codewords.float()).div(units).abs().max()) <= 0.5
        stage_integers(one.values)
    assert "KL to the model on held-out traffic" in (refined / "report.html").read_text()


def test_rivals_stand_in_the_report(refined: Path) -> None:
    rates = json.loads((refined / "metrics.json").read_text())["rates"]
    bits = {row["label"]: row["nominal_bits"] for row in rates}
    assert list(bits) == [
        "ours: tiny", "ours: tiny, first 0.5 of the stages", "FP8 e4m3", "KIVI 1 bit, groups of 32", "CQ-8c8b",
    ]  # fmt: skip
    assert list(bits.values()) == pytest.approx([0.375, 0.28125, 8.0, 2.0, 1.0])
    assert [row["ours"] for row in rates] == [True, True, False, False, False]
    assert all(row["perplexity_ratio"]["held-out"] > 0 for row in rates)
    page = (refined / "report.html").read_text()
    assert "Loss against bits" in page
    assert "KIVI 1 bit, groups of 32" in page


def test_a_rival_that_there_is_not_is_refused_before_work(model_dir: Path, tmp_path: Path) -> None:
    changes = {"evaluate": {**RECIPE["evaluate"], "compare": {"methods": ["kivi-3"]}}}
    result = build(write(tmp_path, model_dir, changes), tmp_path / "artifact")
    assert isinstance(result.exception, GsrqError)
    assert "'kivi-3' is unknown" in str(result.exception)
    assert not (tmp_path / "artifact.work").exists()


def test_text_is_the_same_from_both_backends(built: Path) -> None:
    pieces = {}
    for backend in ("cpu-op", "onnx-function"):
        result = run(
            *("generate", "--artifact", built, "--prompt", "Once upon a time there was", "--max-new-tokens", 40),
            *("--backend", backend),
        )
        assert result.exit_code == 0, result.exception
        assert backend in result.stderr
        pieces[backend] = result.stdout
    assert pieces["cpu-op"] == pieces["onnx-function"]
    sampled = [
        run("generate", "--artifact", built, "--prompt", "Once", "--temperature", 1.0, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_eval_compares_with_the_exact_model(built: Path, model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    out = tmp_path / "figures.json"
    result = run(
        *("eval", "--artifact", built, "--text", text, "--model", model_dir, "--window-tokens", 80, "--windows", 3),
        *("--json", out),
    )
    assert result.exit_code == 0, result.exception
    data = json.loads(out.read_text())
    assert data["exact"]["perplexity"]["windows"] == data["coded"]["perplexity"]["windows"] == 3
    assert data["comparison"]["perplexity_ratio"] == pytest.approx(
        data["coded"]["perplexity"]["perplexity"] / data["exact"]["perplexity"]["perplexity"]
    )
    assert data["comparison"]["perplexity_ratio"] != 1.0


def test_stages_are_not_run_again(built: Path, model_dir: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(built.with_name("artifact.work"), work)
    recipe = write(tmp_path, model_dir)
    again = build(recipe, tmp_path / "again", "--work", work)
    assert again.stderr.count("done before, kept") == 6
    same, other = content(built), content(tmp_path / "again")
    assert same.keys() == other.keys()
    assert [name for name in same if same[name] != other[name]] == []

    changed = write(tmp_path, model_dir, {"cache": {"sinks": 3, "window": 8, "block": 4}})
    plan = build(changed, tmp_path / "again", "--work", work, "--dry-run").output
    status = dict(line.split()[:2] for line in plan.splitlines() if str(work) in line)
    done = dict.fromkeys(("traffic", "capture", "codebooks", "profile"), "done")
    assert status == {**done, "onnx": "to", "evaluate": "to"}
    assert content(tmp_path / "again") == other, "a dry run writes nothing"


def test_a_dry_run_states_sizes_and_writes_nothing(model_dir: Path, tmp_path: Path) -> None:
    result = build(write(tmp_path, model_dir), tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "0.25 nominal bits" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_killed_and_started_again(built: Path, model_dir: Path, tmp_path: Path) -> None:
    """SIGKILL of the real program: never a half artifact, and in the end the same one.

    tests/tools/faults.py, which spares the program's start, kills at every stage and before single calls.
    """
    recipe, out = write(tmp_path, model_dir), tmp_path / "artifact"
    command = [sys.executable, str(ROOT / "cli.py"), "build", "--recipe", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = random.Random(0)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    kills = 0
    for stage in ("capture", "onnx", "evaluate"):
        process = start()
        while process.poll() is None and not list(tmp_path.glob(f"artifact.work/{stage}-*")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert not out.exists() or run("verify", "--artifact", out).exit_code == 0
    assert kills >= 2
    assert start().wait(timeout=120) == 0
    same, other = content(built), content(out)
    for name in ("model.onnx", "model.onnx.data", "codebooks.safetensors", "recipe.resolved.yaml", "metrics.json"):
        assert same[name] == other[name], name


def test_traffic_from_stdin_and_jsonl(model_dir: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"Line {i} of some traffic that people send. " * 3}) + "\n" for i in range(40))
    for kind in ({"kind": "stdin", "format": "jsonl"}, {"kind": "jsonl", "path": str(tmp_path / "t.jsonl")}):
        (tmp_path / "t.jsonl").write_text(lines)
        traffic = {**RECIPE["traffic"], "sources": [kind]}
        recipe = write(tmp_path, model_dir, {"traffic": traffic, "evaluate": None})
        out = tmp_path / kind["kind"]
        result = build(recipe, out, stdin=lines if kind["kind"] == "stdin" else None)
        assert result.exit_code == 0, result.exception
        assert run("verify", "--artifact", out).exit_code == 0
    books = [(tmp_path / k / "codebooks.safetensors").read_bytes() for k in ("stdin", "jsonl")]
    assert books[0] == books[1]
    traffic = {**RECIPE["traffic"], "sources": [{"kind": "stdin"}]}
    plan = build(write(tmp_path, model_dir, {"traffic": traffic}), tmp_path / "dry", "--dry-run")
    assert "depend on what standard input will hold" in plan.output


def test_exact_prefill_and_metric(model_dir: Path, tmp_path: Path) -> None:
    changes = {
        "cache": {**RECIPE["cache"], "prefill": "exact", "exact_dtype": "float32"},
        "codec": {**RECIPE["codec"], "metric": "attention", "method": "kmeans", "weights": "none", "beam": 2},
    }
    result = build(write(tmp_path, model_dir, changes), tmp_path / "out")
    assert result.exit_code == 0, result.exception
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["coded"]["perplexity"]["prompt_tokens"] == 32


def test_rotated_keys_with_everything_the_codec_offers(model_dir: Path, tmp_path: Path) -> None:
    changes = {
        "cache": {"sinks": 2, "window": 16, "block": 8, "exact_dtype": "float32"},
        "codec": {
            **RECIPE["codec"],
            "key_frame": "rotated",
            "keys": {"width": 16, "stages": 2},  # RoPE mixes the sub-vectors
            "metric": "attention",
            "beam": 2,
            "refits": 1,
            "codewords": "int8",
            "finetune": {"steps": 2, "batch": 1, "learning_rate": 0.01},
        },
        "evaluate": {**RECIPE["evaluate"], "compare": {"methods": ["fp8"]}},
    }
    out = tmp_path / "out"
    result = build(write(tmp_path, model_dir, changes), out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert run("verify", "--artifact", out).exit_code == 0
    assert "key frame rotated" in run("inspect", "--artifact", out).output
    assert "keys coded after RoPE" in (out / "report.html").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["schema"], manifest["cache"]["key_frame"]) == ("1.2", "rotated")
    books = load_codebooks(out / "codebooks.safetensors")
    assert all(layer.keys.center is not None and layer.keys.center.any() for layer in books)
    stage_integers(books[0].keys, KEY_SPREAD)
    metrics = json.loads((out / "metrics.json").read_text())
    shared = sum(book.stored_bytes for layer in books for book in (layer.keys, layer.values))
    assert metrics["sizes"][0]["codebook_bytes"] == shared
    # The coded model in torch, over the same codebooks, loses what the artifact does.
    model = LlamaForCausalLM.from_pretrained(model_dir)
    text = next((tmp_path / "out.work").glob("evaluate-*/held-out.txt"))
    runner, tokens = TorchRunner(model), byte_tokenizer().encode(text.read_text(), add_special_tokens=False)
    with coded(model, books, CacheRule(2, 16, 8), beam=2, exact_dtype=torch.float32):
        found = perplexity(runner, tokens, window_tokens=64, windows=2)
    assert found["perplexity"] == pytest.approx(metrics["coded"]["perplexity"]["perplexity"], rel=1e-3)


def test_codes_by_head(model_dir: Path, tmp_path: Path) -> None:
    """The artifact's codes are those of one ordered by token, by head; its logits are the torch cache's."""
    rule = CacheRule(2, 8, 8)
    changes = {
        "cache": {"sinks": 2, "window": 8, "block": 8, "exact_dtype": "float32", "code_order": "head"},
        "codec": {**RECIPE["codec"], "keys": {"width": 16, "stages": 2}, "beam": 2},
        "evaluate": None,
    }
    out = tmp_path / "out"
    result = build(write(tmp_path, model_dir, changes), out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert run("verify", "--artifact", out).exit_code == 0
    assert "codes ordered by head" in run("inspect", "--artifact", out).output
    assert "codes ordered by head" in (out / "report.html").read_text()
    assert json.loads((out / "manifest.json").read_text())["cache"]["code_order"] == "head"
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "GsrqAttention"]
    assert [[a.i for a in node.attribute if a.name == "code_order"] for node in nodes] == [[1], [1]]

    books, model = load_codebooks(out / "codebooks.safetensors"), LlamaForCausalLM.from_pretrained(model_dir)
    ids = torch.randint(3, 257, (1, 70), generator=torch.Generator().manual_seed(0))
    ours = OrtModel(out, threads=1, library=None)
    assert ours.metadata.codes_by_head
    logits = [ours.prefill(ids[:, :37].tolist())] + [ours.step([int(token)]) for token in ids[0, 37:]]
    with coded(model, books, rule, beam=2, exact_dtype=torch.float32), torch.no_grad():
        expected = model(ids, use_cache=True)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(logits)), expected.logits[0, 36:], atol=1e-3, rtol=1e-3)
    for i, layer in enumerate(expected.past_key_values.layers):
        for part, book in (("key_codes", books[i].keys), ("value_codes", books[i].values)):
            held, want = torch.from_numpy(ours.read_cache(i, part)), getattr(layer.cache, part)
            codes = to_token_order(held, book.code_run(32, by_head=True))
            assert torch.equal(codes[:, : rule.coded(70)], want)
            assert not torch.equal(held[:, : rule.coded(70)], want)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"codek": {}}, r"codek.*codec"),
    ({"codec": {"keys": {"width": 48, "stages": 2}}}, r"codec\.keys\.width.*48"),
    ({"codec": {"keys": {"width": 64, "stages": 0}}}, r"codec\.keys\.stages.*0"),
    ({"codec": {"method": "magic"}}, r"codec\.method.*magic"),
    ({"cache": {**RECIPE["cache"], "code_order": "head"}}, r"cache\.block = 4.*code_order"),
    ({"export": {"max_length": 4096}}, r"export\.max_length.*4096.*512"),
    ({"model": {"path": "/nowhere/model"}}, r"/nowhere/model"),
    (
        {"traffic": {**RECIPE["traffic"], "sources": [{"kind": "text", "path": "/nowhere/text.txt"}]}},
        r"/nowhere/text\.txt",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD)])
def test_bad_recipes_are_refused_before_any_work(
    changes: dict[str, Any], message: str, model_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": {"path": str(model_dir)}, **changes}))
    with pytest.raises(GsrqError, match=rf"(?s){message}"):
        run_raising("build", "--recipe", str(recipe), "--out", str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def run_raising(*arguments: str) -> None:
    cli.main(list(arguments), standalone_mode=False)


def test_damaged_models_are_refused(model_dir: Path, tmp_path: Path) -> None:
    def attempt(damage: str) -> None:
        copy = tmp_path / damage
        shutil.copytree(model_dir, copy)
        weights = copy / "model.safetensors"
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        elif damage == "missing":
            weights.unlink()
        elif damage == "tokenizer":
            config = json.loads((copy / "tokenizer.json").read_text())
            config["model"]["vocab"]["zzz"] = 5000
            (copy / "tokenizer.json").write_text(json.dumps(config))
        recipe = write(tmp_path, copy)
        run_raising("build", "--recipe", str(recipe), "--out", str(tmp_path / "out"))

    with pytest.raises(GsrqError, match="damaged or truncated"):
        attempt("truncated")
    with pytest.raises(GsrqError, match=r"model\.safetensors are missing"):
        attempt("missing")
    with pytest.raises(GsrqError, match="makes ids up to 5000, the model has 257 embeddings"):
        attempt("tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_no_artifact_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letters.txt").write_text("dear")
    with pytest.raises(GsrqError, match="holds files and is not an artifact"):
        run_raising("build", "--recipe", str(write(tmp_path, model_dir)), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out/letters.txt").read_text() == "dear"


def test_the_programs_exit_status(tmp_path: Path) -> None:
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "verify", "--artifact", str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error:")
    assert "mend:" in process.stderr
    assert "Traceback" not in process.stderr
    assert time.monotonic() - started < 60


def test_recipes_that_come_along_are_sound() -> None:
    result = run("recipes", "list")
    assert result.exit_code == 0
    assert "recipes/demo.yaml" in result.output
    sound = run("recipes", "validate", ROOT / "recipes/demo.yaml")
    assert sound.exit_code == 0
    assert "1 nominal bits" in sound.output
    assert run("recipes", "validate", "--no-model", ROOT / "recipes/recall-28m.yaml").exit_code == 0

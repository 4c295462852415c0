"""The real lm-eval on tasks with local data, through torch and through an artifact, against figures made by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from families import ROOT, tiny_model
from small_codes import RULE
from tiny_artifact import TinyArtifact, export
from traffic.byte_tokenizer import byte_tokenizer

from gsrq_export import GsrqError, coded
from gsrq_export.commands.app import cli
from gsrq_export.evaluate.harness import LM_EVAL, Harness, HarnessEvaluation, HarnessSettings, check_names
from gsrq_export.evaluate.harness_model import HarnessModel
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.runtime.generate import Generation
from gsrq_export.runtime.session import OrtModel

EOS = frozenset({0})
MAX_LENGTH = 300
CHOICES = [
    {
        "question": f"Item {i}: {'what comes after ' * (1 + i % 3)}{i}?",
        "choices": ["one", "a pair", "none"],
        "gold": i % 3,
    }
    for i in range(4)
]
# The fields of LongBench's files.
PASSAGES = [
    {
        "context": f"In year {i} a ship of {i} masts lay in the harbour. " * 3,
        "input": "How many?",
        "answers": [str(i), "x"],
    }
    for i in range(4)
]
TEXTS = [{"page": "It was a bright cold day, and the clocks were striking. " * n} for n in (1, 2, 6)]


def write_tasks(directory: Path) -> Path:
    """Three tasks, one of each output type, and a group over two of them."""
    directory.mkdir()
    for name, rows in (("choice", CHOICES), ("passages", PASSAGES), ("pages", TEXTS)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, data: str, **fields: Any) -> None:
        base = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / f"{data}.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1},
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({**base, **fields}))

    task(
        "my_choice",
        "choice",
        output_type="multiple_choice",
        doc_to_text="{{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    )
    task(
        "my_longbench",
        "passages",
        output_type="generate_until",
        doc_to_text="Read this.\n{{context}}\nQuestion: {{input}}\nAnswer:",
        doc_to_target="{{answers}}",
        generation_kwargs={"max_gen_toks": 12, "do_sample": False, "temperature": 1, "until": []},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    task(
        "my_pages",
        "pages",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    (directory / "my_group.yaml").write_text(yaml.safe_dump({"group": "my_group", "task": ["my_choice", "my_pages"]}))
    return directory


@dataclass(frozen=True)
class Made:
    artifacts: dict[bool, TinyArtifact]  # by exact_prefill
    model_dir: Path
    tasks: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("harness")
    model = tiny_model("Llama", vocab_size=257, num_hidden_layers=1, head_dim=32, bos_token_id=0, eos_token_id=0)
    letters = byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")
    with torch.no_grad():  # it writes letters, so that texts compare as they are printed
        head = model.get_output_embeddings().weight
        head.mul_(torch.zeros(257, 1).index_fill(0, torch.tensor(letters), 1))
    artifacts = {}
    for exact_prefill in (False, True):
        path = root / f"artifact-{exact_prefill}"
        path.mkdir()
        artifacts[exact_prefill] = export(model, path, RULE, exact_prefill, torch.float32, MAX_LENGTH)
        byte_tokenizer().save_pretrained(path / "tokenizer")
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    return Made(artifacts, root / "model", write_tasks(root / "tasks"))


def run(made: Made, runner: Any, *tasks: str, exact_prefill: bool = False) -> HarnessEvaluation:
    harness = Harness(HarnessSettings(tasks, made.tasks))
    found = harness.run(runner, byte_tokenizer(), EOS, exact_prefill, MAX_LENGTH)
    json.dumps(found, allow_nan=False)
    assert found["lm_eval"] == lm_eval.__version__
    return found


def stepwise_loss(model: Any, context: list[int], continuation: list[int]) -> float:
    """The continuation's negative log-likelihood with a cache, each token and the context's last one a step."""
    total = 0.0
    with torch.no_grad():
        out = model(torch.tensor([context[:-1]]), use_cache=True) if len(context) > 1 else None
        for token, target in zip([context[-1], *continuation[:-1]], continuation, strict=True):
            past = out.past_key_values if out is not None else None
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            total -= float(out.logits[0, -1].log_softmax(-1)[target])
    return total


@pytest.mark.parametrize("exact_prefill", [False, True])
def test_scores_come_from_the_coded_cache(made: Made, exact_prefill: bool) -> None:
    """Choices and pages by hand, from torch's coded cache, token by token."""
    artifact, tokenizer = made.artifacts[exact_prefill], byte_tokenizer()
    found = run(made, OrtRunner(OrtModel(artifact.path)), "my_choice", "my_pages", exact_prefill=exact_prefill)[
        "results"
    ]
    with coded(
        artifact.model, artifact.codebooks, artifact.rule, exact_prefill=exact_prefill, exact_dtype=torch.float32
    ):
        hits, bits, size = [], 0.0, 0
        for row in CHOICES:
            context = tokenizer.encode(f"{row['question']}\nAnswer:")
            losses = [
                stepwise_loss(artifact.model, context, tokenizer.encode(f" {choice}")) for choice in row["choices"]
            ]
            hits.append(int(np.argmin(losses)) == row["gold"])
        for page in TEXTS[:2]:  # the third is longer than the model and is cut into windows
            bits += stepwise_loss(artifact.model, [0], tokenizer.encode(page["page"])) / math.log(2)
            size += len(page["page"].encode())
    assert found["my_choice"]["samples"] == 4
    accuracy = found["my_choice"]["metrics"]["acc,none"]
    assert accuracy["value"] == pytest.approx(np.mean(hits))
    assert accuracy["stderr"] == pytest.approx(np.std(hits, ddof=1) / math.sqrt(4))
    short = Harness(HarnessSettings(("my_pages",), made.tasks, limit=2)).run(
        OrtRunner(OrtModel(artifact.path)), tokenizer, EOS, exact_prefill
    )
    assert short["results"]["my_pages"]["metrics"]["bits_per_byte,none"]["value"] == pytest.approx(
        bits / size, rel=1e-3
    )
    plain = run(made, TorchRunner(artifact.model), "my_pages")["results"]["my_pages"]["metrics"]
    assert plain["bits_per_byte,none"]["value"] != pytest.approx(
        found["my_pages"]["metrics"]["bits_per_byte,none"]["value"], rel=1e-3
    )


def test_one_token_is_scored_from_codes_even_after_an_exact_prefill(made: Made) -> None:
    artifact, tokenizer = made.artifacts[True], byte_tokenizer()
    context, target = tokenizer.encode("Some words that fill the cache, and then"), [5]
    model = HarnessModel(OrtRunner(OrtModel(artifact.path)), tokenizer, EOS, exact_prefill=True)
    ((score, greedy),) = model._loglikelihood_tokens([("", context, target)])
    exact = stepwise_loss(artifact.model, context, target)
    with coded(artifact.model, artifact.codebooks, artifact.rule, exact_prefill=True, exact_dtype=torch.float32):
        expected = stepwise_loss(artifact.model, context, target)
        with torch.no_grad():
            first = artifact.model(torch.tensor([context[:-1]]), use_cache=True)
            logits = artifact.model(torch.tensor([context[-1:]]), past_key_values=first.past_key_values).logits
    assert -score == pytest.approx(expected, rel=1e-3)
    assert greedy == (int(logits[0, -1].argmax()) == 5)
    assert expected != pytest.approx(exact, rel=1e-3)


def test_equal_shapes_share_a_batch_and_keep_their_order(made: Made) -> None:
    artifact, tokenizer = made.artifacts[False], byte_tokenizer()
    runner = OrtRunner(OrtModel(artifact.path))
    model = HarnessModel(runner, tokenizer, EOS, exact_prefill=False, batch=2)
    rng = np.random.default_rng(0)
    pairs = [("", rng.integers(1, 257, 30 + 5 * (i % 2)).tolist(), rng.integers(1, 257, 3).tolist()) for i in range(7)]
    best = runner.greedy([pairs[4][1]], 3)[0]
    pairs[4] = ("", pairs[4][1], best)
    together = model._loglikelihood_tokens(pairs)
    for pair, (score, greedy) in zip(pairs, together, strict=True):
        nll = runner.nll(torch.tensor([[*pair[1], *pair[2]]]), len(pair[1]))
        assert score == pytest.approx(-float(nll.sum()), rel=1e-4)
        assert greedy == (pair[2] == best)


def test_generation_ends_at_stop_strings(made: Made, tmp_path: Path) -> None:
    artifact, tokenizer = made.artifacts[False], byte_tokenizer()
    texts = [f"Read this.\n{row['context']}\nQuestion: {row['input']}\nAnswer:" for row in PASSAGES]
    model = OrtModel(artifact.path)
    whole = ["".join(Generation(model, tokenizer, text, max_new_tokens=12, eos=EOS)) for text in texts]
    assert all(len(text) == 12 and text.isalpha() for text in whole)
    stop = whole[1][4:6]
    tasks = write_tasks(tmp_path / "tasks")
    rows = [{**row, "answers": [text.split(stop)[0]]} for row, text in zip(PASSAGES, whole, strict=True)]
    (tasks / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((tasks / "my_longbench.yaml").read_text())
    config["generation_kwargs"]["until"] = [stop]
    config["doc_to_target"] = "{{answers[0]}}"
    (tasks / "my_longbench.yaml").write_text(yaml.safe_dump(config))
    harness = Harness(HarnessSettings(("my_longbench",), tasks, batch=3))
    metric = harness.run(OrtRunner(model), tokenizer, EOS)["results"]["my_longbench"]["metrics"]["exact_match,none"]
    assert metric["value"] == 1.0
    plain = harness.run(TorchRunner(artifact.model), tokenizer, EOS)["results"]["my_longbench"]["metrics"]
    assert plain["exact_match,none"]["value"] < 1.0, "the exact cache continues in another way"
    last = whole[1][-1]
    lm = HarnessModel(OrtRunner(model), tokenizer, frozenset(tokenizer.encode(last)), exact_prefill=False)
    assert lm._generate([tokenizer.encode(texts[1])], 12, ()) == [whole[1].split(last)[0]], "a token that ends a text"

    config["generation_kwargs"] = {"do_sample": True, "temperature": 0.7}
    (tasks / "my_longbench.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(GsrqError, match=r"the task samples \(do_sample: true\)"):
        Harness(HarnessSettings(("my_longbench",), tasks)).run(OrtRunner(model), tokenizer, EOS)


def test_long_contexts_lose_their_start_and_are_counted(made: Made) -> None:
    artifact, tokenizer = made.artifacts[False], byte_tokenizer()
    runner = OrtRunner(OrtModel(artifact.path))
    model = HarnessModel(runner, tokenizer, EOS, exact_prefill=False, max_length=40)
    assert model.max_length == 40
    context = list(range(1, 60))
    cut, whole = model._loglikelihood_tokens([("", context, [7, 8]), ("", context[-38:], [7, 8])])
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)
    assert model.truncated == 1
    with pytest.raises(GsrqError, match="a continuation of 40 tokens cannot be scored with 40"):
        model._loglikelihood_tokens([("", [1], context[:40])])


def test_the_chat_template_is_put_on(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
    runner = TorchRunner(made.artifacts[False].model)
    seen: list[str] = []

    class Watched(HarnessModel):
        def tok_encode(self, string: str, *arguments: Any, **more: Any) -> list[int]:
            seen.append(string)
            return super().tok_encode(string, *arguments, **more)

    monkeypatch.setattr("gsrq_export.evaluate.harness_model.HarnessModel", Watched)
    Harness(HarnessSettings(("my_choice",), made.tasks, limit=1, chat=True)).run(runner, tokenizer, EOS)
    assert f"<user>{CHOICES[0]['question']}\nAnswer:<bot>" in seen


def test_the_command_sets_both_side_by_side(made: Made, tmp_path: Path) -> None:
    artifact, out = made.artifacts[False], tmp_path / "figures.json"
    arguments = [
        *("eval", "--artifact", artifact.path, "--model", made.model_dir, "--json", out, "--limit", 3),
        *("--tasks", "my_group,my_longbench", "--lm-eval-include", made.tasks),
    ]
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    for part in ("my_choice, 3 documents: acc,none", "my_pages", "my_longbench", "exact", "coded", "±"):
        assert part in result.output
    data = json.loads(out.read_text())
    assert data.keys() == {"lm_eval"}
    exact, mine = data["lm_eval"]["exact"]["results"], data["lm_eval"]["coded"]["results"]
    assert exact.keys() == mine.keys() == {"my_group", "my_choice", "my_pages", "my_longbench"}
    rates = [side["my_pages"]["metrics"]["bits_per_byte,none"]["value"] for side in (exact, mine)]
    assert rates[0] != rates[1]


def test_longbench_tasks_resolve() -> None:
    """Their names and output types; the data is not here."""
    from lm_eval.tasks import TaskManager

    directory = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    for name in ("longbench", "longbench_single", "longbench_hotpotqa", "longbench_gov_report", "longbench_lcc"):
        assert name in manager.all_tasks

    class Raw(yaml.SafeLoader):
        pass

    Raw.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    config = yaml.load((directory / "hotpotqa.yaml").read_text(), Raw)
    assert config["generation_kwargs"]["do_sample"] is False, "greedy decoding is what this evaluation does"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "--tasks names no task"),
        ({"include": Path("/nowhere")}, "--lm-eval-include /nowhere is no directory"),
        ({"limit": 0}, "limit: 0 is below 1"),
        ({"num_fewshot": -1}, "num_fewshot: -1 is below 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GsrqError, match=message):
        HarnessSettings(**{"tasks": ("piqa",), **settings})


def test_faults_of_tasks_are_named(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "choice.jsonl").unlink()
    with pytest.raises(GsrqError, match=r"(?s)--tasks my_choice: .*choice\.jsonl.*mend: a task's data must"):
        Harness(HarnessSettings(("my_choice",), tasks))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GsrqError, match=rf"needs lm-eval.*\n.*`pip install lm_eval=={re.escape(LM_EVAL)}`"):
        Harness(HarnessSettings(("my_choice",), made.tasks))


def test_the_pinned_version_is_the_one_tested() -> None:
    assert lm_eval.__version__ == LM_EVAL
    assert (ROOT / "pyproject.toml").read_text().count(f'"lm_eval=={LM_EVAL}"') == 2  # the extras eval and dev


def test_unknown_names_are_likened_to_known_ones() -> None:
    check_names(["piqa"], ["piqa"])
    with pytest.raises(GsrqError, match=r"lm-eval knows no task 'piqaa'\n.*did you mean piqa\?"):
        check_names(["piqaa"], ["arc_easy", "piqa"])
    with pytest.raises(GsrqError, match=r"no task 'zzz'\n.*lm-eval ls tasks"):
        check_names(["zzz"], ["arc_easy", "piqa"])

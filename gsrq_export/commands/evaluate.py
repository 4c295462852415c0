"""gsrq eval: an artifact as it is deployed, beside the model it was built from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from gsrq_export.commands.evaluation_table import evaluation_table, harness_table
from gsrq_export.commands.options import artifact_option, backend_option, open_model, threads_option
from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.fidelity import FidelitySettings
from gsrq_export.evaluate.harness import Harness, HarnessEvaluation, HarnessSettings
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.suite import EvaluationSettings, evaluate_pair, given_tokens
from gsrq_export.evaluate.suite import evaluate as run_evaluation
from gsrq_export.evaluate.tasks.measure import TaskSettings
from gsrq_export.evaluate.tasks.names import TaskName
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.gate.measure import read_text
from gsrq_export.model.loading import load_original, model_directory
from gsrq_export.runtime.generate import load_eos, load_tokenizer
from gsrq_export.stages.progress import make_reporter
from gsrq_export.stages.storage import write_atomic


@click.command("eval")
@artifact_option
@click.option("--text", "text_file", type=click.Path(path_type=Path, dir_okay=False), help="Held-out text.")
@click.option("--model", help="The unquantized model, to compare with: a directory or hub id.")
@click.option("--windows", type=int, default=8, show_default=True, help="Perplexity windows at most.")
@click.option("--window-tokens", type=int, default=1024, show_default=True)
@click.option("--length", "lengths", type=int, multiple=True, help="Recall at this many tokens; may be repeated.")
@click.option("--cases", type=int, default=24, show_default=True, help="Recall cases a length.")
@click.option(
    "--task",
    "task_names",
    type=click.Choice(get_args(TaskName)),
    multiple=True,
    help="A long-context task; may be repeated.",
)
@click.option("--task-length", "task_lengths", type=int, multiple=True, help="Its tokens; may be repeated; else 1024.")
@click.option("--task-cases", type=int, default=16, show_default=True, help="Cases of a task and length.")
@click.option("--fidelity", "prompts", type=int, help="Long generations to compare with --model's: so many prompts.")
@click.option(
    "--fidelity-prompt", "prompt_tokens", type=int, default=512, show_default=True, help="Tokens of a prompt."
)
@click.option("--fidelity-tokens", type=int, default=256, show_default=True, help="Tokens of a generation.")
@click.option("--tasks", "harness_tasks", help="Tasks of lm-eval, with commas between; needs the extra `eval`.")
@click.option(
    "--lm-eval-include", type=click.Path(path_type=Path, file_okay=False), help="Directory of more lm-eval tasks."
)
@click.option("--limit", type=int, help="lm-eval: documents a task at most.")
@click.option("--num-fewshot", type=int, help="lm-eval: examples before a document; else the task's own number.")
@click.option("--chat", is_flag=True, help="lm-eval: put requests into the chat template.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here too."
)
@threads_option
@backend_option
def evaluate(
    artifact: Path,
    text_file: Path | None,
    model: str | None,
    windows: int,
    window_tokens: int,
    lengths: tuple[int, ...],
    cases: int,
    task_names: tuple[TaskName, ...],
    task_lengths: tuple[int, ...],
    task_cases: int,
    prompts: int | None,
    prompt_tokens: int,
    fidelity_tokens: int,
    harness_tasks: str | None,
    lm_eval_include: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    seed: int,
    json_file: Path | None,
    threads: int | None,
    backend: str,
) -> None:
    """Measure an artifact through ONNX Runtime, as it is deployed.

    Perplexity, recall, long-context tasks and fidelity on held-out --text; benchmarks of lm-eval by --tasks.
    See docs/evaluation.md.
    """
    if text_file is None and (lengths or task_names or prompts is not None or not harness_tasks):
        raise GsrqError("--text is missing", "name a file of held-out text; only --tasks goes without")
    if prompts is not None and model is None:
        raise GsrqError("--fidelity compares with the unquantized model", "name it with --model")
    if task_lengths and not task_names:
        raise GsrqError(f"--task-length {task_lengths[0]} without a task", "name one with --task")
    if not harness_tasks and (lm_eval_include or chat or limit is not None or num_fewshot is not None):
        raise GsrqError("options of lm-eval without --tasks", "name its tasks with --tasks")
    text = read_text(text_file)[0] if text_file is not None else None
    coded = open_model(artifact, threads, backend)
    exact_prefill = coded.metadata.exact_prefill
    tokenizer = load_tokenizer(artifact)
    settings = EvaluationSettings(
        window_tokens=window_tokens,
        windows=windows,
        prompt_tokens=given_tokens(window_tokens, exact_prefill),
        recall_lengths=lengths,
        recall_cases=cases,
        seed=seed,
        tasks=TaskSettings(task_names, task_lengths or (1024,), task_cases) if task_names else None,
        fidelity=FidelitySettings(prompts, prompt_tokens, fidelity_tokens) if prompts is not None else None,
    )
    harness = None
    if harness_tasks:
        names = tuple(name.strip() for name in harness_tasks.split(",") if name.strip())
        harness = Harness(HarnessSettings(names, lm_eval_include, limit, num_fewshot, chat))
    exact = TorchRunner(load_original(model, model_directory(model), tokenizer)) if model is not None else None
    runner = OrtRunner(coded)
    data: dict[str, Any] = {}
    if text is not None:
        reporter = make_reporter()
        if exact is not None:
            data |= evaluate_pair(exact, runner, tokenizer, text, settings, reporter)
        else:
            with reporter.task("coded: windows and cases", settings.steps) as task:
                data["coded"] = run_evaluation(runner, tokenizer, text, settings, task.advance)
        Console().print(evaluation_table(data, coded.backend))
    if harness is not None:
        scores: dict[str, HarnessEvaluation] = {}
        if exact is not None:
            scores["exact"] = harness.run(exact, tokenizer, load_eos(artifact), max_length=runner.max_length)
        scores["coded"] = harness.run(runner, tokenizer, load_eos(artifact), exact_prefill)
        Console().print(harness_table(scores, coded.backend))
        data["lm_eval"] = scores
    if json_file is not None:
        write_atomic(json_file, lambda path: path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n"))

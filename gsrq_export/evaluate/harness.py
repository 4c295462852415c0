"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), on any runner."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from gsrq_export.errors import GsrqError
from gsrq_export.evaluate.runner import Runner

LM_EVAL = "0.4.13"  # the version that the extra `eval` pins
BOOTSTRAP = 1000  # resamples, where lm-eval has no closed form for a standard error


class HarnessMetric(TypedDict):
    """``stderr`` is lm-eval's; None where it gives none."""

    value: float
    stderr: float | None


class HarnessResult(TypedDict):
    """One task or group. ``metrics`` by lm-eval's name and filter ("acc,none"); ``samples``: documents scored,
    None for a group.
    """

    samples: int | None
    metrics: dict[str, HarnessMetric]


class HarnessEvaluation(TypedDict):
    """What lm-eval measured on one runner. ``truncated``: requests that lost the start of their context, as it
    was longer than the model's.
    """

    results: dict[str, HarnessResult]
    truncated: int
    lm_eval: str


@dataclass(frozen=True)
class HarnessSettings:
    """What lm-eval is asked for.

    Attributes:
        tasks: names of tasks, groups or tags.
        include: a directory of task YAML files besides lm-eval's own; may hold Python that they call.
        limit: documents a task at most.
        num_fewshot: examples before each document; None leaves it to the task.
        chat: put requests into the tokenizer's chat template.
        batch: requests at once.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    batch: int = 8

    def __post_init__(self) -> None:
        if not self.tasks:
            raise GsrqError("--tasks names no task", "give names with commas between, such as piqa,arc_easy")
        if self.include is not None and not self.include.is_dir():
            raise GsrqError(
                f"--lm-eval-include {self.include} is no directory", "name the one that holds the tasks' YAML files"
            )
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise GsrqError(f"{name}: {value} is below {least}", f"use {least} or more")


class Harness:
    """lm-eval with the tasks loaded, ready to run on one runner after the other.

    Raises:
        GsrqError: lm-eval is not installed, a task is not known, or its data cannot be had.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise GsrqError(
                "--tasks needs lm-eval, which is not installed", f"install it with `pip install lm_eval=={LM_EVAL}`"
            )
        self._settings = settings
        self._manager = _own_tasks(settings) or _all_tasks(settings)

    def run(
        self,
        runner: Runner,
        tokenizer: Any,
        eos: frozenset[int],
        exact_prefill: bool = False,
        max_length: int | None = None,
    ) -> HarnessEvaluation:
        """Score one runner.

        Args:
            eos: token ids that end a text.
            exact_prefill, max_length: see `HarnessModel`.
        Raises:
            GsrqError: a task asks for sampling, or a request does not fit the model.
        """
        import lm_eval

        from gsrq_export.evaluate.harness_model import HarnessModel

        settings = self._settings
        model = HarnessModel(runner, tokenizer, eos, exact_prefill, max_length, settings.batch)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(settings.tasks),
            task_manager=self._manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.chat,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
        counts = found.get("n-samples", {})
        return HarnessEvaluation(
            results={name: _result(row, counts.get(name)) for name, row in found["results"].items()},
            truncated=model.truncated,
            lm_eval=lm_eval.__version__,
        )


def _result(row: dict[str, Any], count: dict[str, int] | None) -> HarnessResult:
    metrics = {}
    for key, value in row.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error: Any = row.get(f"{name}_stderr,{kind}")
        known = isinstance(error, (int, float)) and error == error  # NaN is lm-eval's word for none
        metrics[key] = HarnessMetric(value=float(value), stderr=float(error) if known else None)
    return HarnessResult(samples=count["effective"] if count else None, metrics=metrics)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of tasks that are not known, likening them to those that are."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            raise GsrqError(
                f"--tasks: lm-eval knows no task {name!r}",
                f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks`, or give --lm-eval-include",
            )


def _own_tasks(settings: HarnessSettings) -> Any:
    """A TaskManager of ``include`` alone, if that is enough: indexing lm-eval's own tasks takes a while."""
    from lm_eval.tasks import TaskManager

    if settings.include is None:
        return None
    manager = TaskManager(include_path=str(settings.include), include_defaults=False)
    if not set(settings.tasks) <= set(manager.all_tasks):
        return None
    try:
        manager.load(list(settings.tasks))
    except KeyError:  # a group of theirs names one of lm-eval's
        return None
    except Exception as error:
        raise _unloadable(settings, error) from error
    return manager


def _all_tasks(settings: HarnessSettings) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(settings.include) if settings.include else None)
    check_names(settings.tasks, manager.all_tasks)
    try:
        manager.load(list(settings.tasks))
    except Exception as error:
        raise _unloadable(settings, error) from error
    return manager


def _unloadable(settings: HarnessSettings, error: Exception) -> GsrqError:
    """Whatever a data set's loader or a task's own Python raised, as one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return GsrqError(
        f"--tasks {','.join(settings.tasks)}: {line}",
        "a task's data must lie in the Hugging Face cache, be there to download, or be files that its YAML names",
    )

"""What is wrong with a recipe, a line a field: dotted name, value, what is wrong, what to do."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from gsrq_export.errors import GsrqError

SHOWN = 60  # characters of a value that a message repeats
WRITE = {
    "int": "a whole number",
    "float": "a number (1.0e-3, not 1e-3: YAML reads that as text)",
    "string": "text, quoted if it looks like a number",
    "bool": "true or false",
    "tuple": "a list",
    "model": "keys and values",
}


@dataclass(frozen=True)
class FieldProblem:
    field: str  # dotted
    value: object
    problem: str
    mend: str

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
        return f"{self.field} = {shown}: {self.problem}"


def recipe_error(name: str, problems: Sequence[FieldProblem]) -> GsrqError:
    """One error for all problems of a recipe."""
    if len(problems) == 1:
        return GsrqError(f"recipe {name}: {problems[0]}", problems[0].mend)
    lines = "".join(f"\n  {p}; {p.mend}" for p in problems)
    return GsrqError(f"recipe {name} has {len(problems)} problems:{lines}", "correct these fields")


def describe_errors(error: ValidationError, data: dict[str, Any], model: type[BaseModel]) -> list[FieldProblem]:
    """Pydantic's errors about ``data`` in the project's words."""
    problems: list[FieldProblem] = []
    for item in error.errors(include_url=False):
        raised = item.get("ctx", {}).get("error")
        if isinstance(raised, ValueError) and raised.args and isinstance(raised.args[0], list):
            problems += raised.args[0]
            continue
        location = _without_tags(item["loc"], data)
        field = ".".join(map(str, location)) or "(top level)"
        problems.append(_describe(item, field, location, data, model))
    return problems


def _describe(
    item: Any, field: str, location: tuple[str | int, ...], data: dict[str, Any], model: type[BaseModel]
) -> FieldProblem:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1], data)
        return FieldProblem(field, value, "unknown key", _suggest(str(location[-1]), known))
    if kind == "missing":
        return FieldProblem(field, None, "is missing", "add it")
    if kind == "literal_error":
        allowed = [
            str(a) for a in typing.cast(str, context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        ]
        return FieldProblem(field, value, "not one of the allowed values", _suggest(str(value), allowed))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [t.strip("' ") for t in str(context.get("expected_tags", "'self', 'jsonl', 'text', 'stdin'")).split(",")]
        given = value.get("kind") if isinstance(value, dict) else value
        return FieldProblem(f"{field}.kind", given, "names no kind of source", _suggest(str(given), tags))
    if kind == "string_pattern_mismatch":
        return FieldProblem(
            field, value, "not a plain name", "use lower-case letters, digits, '.', '_' and '-', at most 63 of them"
        )
    if kind.rsplit("_", 1)[-1] in ("type", "parsing"):
        wanted = WRITE.get(kind.split("_")[0], "another type of value")
        return FieldProblem(field, value, f"is {type(value).__name__}", f"write {wanted}")
    message = str(item["msg"])
    return FieldProblem(
        field, value, "out of range" if "equal" in message or "than" in message else "not valid", message
    )


def _suggest(given: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, allowed, 1, 0.6)
    head = f"did you mean {close[0]!r}? " if close else ""
    return f"{head}use one of: {', '.join(allowed)}"


def _without_tags(location: Sequence[str | int], data: Any) -> tuple[str | int, ...]:
    """Pydantic puts a union's tag into the location; the recipe has no such level."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        if isinstance(data, dict) and part not in data and data.get("kind") == part and i < len(location) - 1:
            continue
        path.append(part)
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
    return tuple(path)


def _known_keys(model: type[BaseModel], location: Sequence[str | int], data: Any) -> list[str]:
    """The keys of the section at a location."""
    models: list[type[BaseModel]] = [model]
    for part in location:
        data = data[part]
        if isinstance(part, int):
            continue
        models = [
            found for m in models if part in m.model_fields for found in _models_in(m.model_fields[part].annotation)
        ]
    if isinstance(data, dict) and len(models) > 1:
        models = [m for m in models if data.get("kind") in typing.get_args(m.model_fields["kind"].annotation)]
    return [key for m in models for key in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _models_in(part)]

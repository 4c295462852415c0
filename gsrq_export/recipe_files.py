"""A recipe's YAML: strict about what it says, and composed of the files that it names under ``extends``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gsrq_export.errors import GsrqError

MAX_RECIPE_BYTES = 1 << 20
MAX_CHARACTERS = 128 << 10  # a second of reading, at most
MAX_DEPTH = 50
MAX_NODES = 50_000  # values of a recipe, each as often as aliases repeat it
MAX_EXTENDED = 8  # files that extend each other
EXTENDS = "extends"


def asset_roots() -> list[Path]:
    """Where recipes' relative paths may also start: a checkout's root, or the files bundled with the package."""
    package = Path(__file__).resolve().parent
    return [root for root in (package.parent, package / "_bundled") if (root / "assets").is_dir()]


def bundled_recipes() -> list[Path]:
    """The recipes that come along; their units, which only complete others, are not among them."""
    return sorted(file for root in asset_roots() for file in (root / "recipes").glob("*.yaml"))


def find_recipe(value: str | Path) -> Path:
    """A recipe's file: the path itself, or the recipe of that name that comes along.

    Raises:
        GsrqError: neither.
    """
    path = Path(value)
    if path.is_file():
        return path
    named = {file.stem: file for file in bundled_recipes()}
    if str(value) in named:
        return named[str(value)]
    raise GsrqError(
        f"recipe {value} cannot be read: no such file, and no recipe of that name comes along",
        f"give a YAML file, or one of {', '.join(sorted(named))}",
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's keys and values, with those of the files it extends.

    ``extends`` is a list of files, looked for beside the file that names them and among the recipes that come along.
    Later files take precedence over earlier ones and the file itself over all: mappings are merged key by key,
    everything else is replaced. Relative paths inside all of them start at the recipe, not at the unit.

    Raises:
        GsrqError: a file that cannot be read, is not YAML, or extends itself.
    """
    return _read(path, ())


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Keys and values of a YAML text.

    Raises:
        GsrqError: too long or deep, not YAML, not a mapping, or with a key that stands twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise GsrqError(f"recipe {name} has over {MAX_CHARACTERS >> 10} Ki characters", "see recipes/ for examples")
    try:
        data = yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise GsrqError(f"recipe {where}: {error.problem}", "correct the YAML at that place") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise GsrqError(f"recipe {name} is not YAML: {error}", "see recipes/ for examples") from None
    if not isinstance(data, dict):
        raise GsrqError(f"recipe {name}: holds {type(data).__name__}, not keys and values", "see recipes/ for examples")
    return data


def _read(path: Path, chain: Sequence[Path]) -> dict[str, Any]:
    here = path.resolve()
    if here in chain or len(chain) >= MAX_EXTENDED:
        steps = " -> ".join(file.name for file in (*chain, here))
        what = "a file extends itself" if here in chain else f"more than {MAX_EXTENDED} files extend each other"
        raise GsrqError(f"recipe {chain[0]}: {EXTENDS}: {what}: {steps}", "name each file once")
    data = parse_yaml(_text(path), str(path))
    if EXTENDS not in data:
        return data
    names = data.pop(EXTENDS)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise GsrqError(
            f"recipe {path}: {EXTENDS} = {names!r}: is not a list of files", f"write {EXTENDS}: [FILE, ...]"
        )
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, _read(_unit(name, path), (*chain, here)))
    return merge(merged, data)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: mappings key by key, everything else replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _unit(name: str, path: Path) -> Path:
    places = [path.resolve().parent, *(root / "recipes" for root in asset_roots())]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise GsrqError(
        f"recipe {path}: {EXTENDS}: there is no file {name}",
        f"paths start at {places[0]}, or at the recipes that come along",
    )


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise GsrqError(f"{path} has {size} bytes: not a recipe", "give a recipe's YAML file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GsrqError(
            f"recipe {path} is not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8"
        ) from None
    except OSError as error:
        raise GsrqError(
            f"recipe {path} cannot be read: {error.strerror}", "`gsrq recipes list` lists those there are"
        ) from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, which YAML parsers silently resolve to the last one, and aliases that multiply."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # each level costs the scanner time for every token within
            raise yaml.MarkedYAMLError(problem=f"brackets over {MAX_DEPTH} deep", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _expanded_size(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a word", problem_mark=key_node.start_mark)
            if key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice; first in line {first}", problem_mark=key_node.start_mark
                )
            seen[key] = key_node
        return super().construct_mapping(node, deep)


def _expanded_size(node: Any, sizes: dict[int, int]) -> int:
    """Nodes below and including one, each as often as aliases repeat it.

    Raises:
        MarkedYAMLError: over MAX_NODES, or a node within itself.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.MarkedYAMLError(problem="an alias stands within what it names", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # not known yet
    size = 1
    if isinstance(node, yaml.MappingNode):
        size += sum(_expanded_size(part, sizes) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_expanded_size(part, sizes) for part in node.value)
    if size > MAX_NODES:
        raise yaml.MarkedYAMLError(problem=f"over {MAX_NODES} values, aliases followed", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size

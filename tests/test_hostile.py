"""Files from strangers: whatever they hold, gsrq takes them or refuses them with a GsrqError."""

from __future__ import annotations

import ast
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from families import ROOT
from fuzz import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsrq_export.errors import GsrqError
from gsrq_export.recipe import parse_recipe

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
NAMES = sorted(targets.TARGETS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, target: str) -> bytes:
    """A seed with some bytes changed, removed, repeated or cut off."""
    data = bytearray(draw(st.sampled_from(targets.seeds(target))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["set", "insert", "remove", "repeat", "cut"]))
        if what == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "repeat":
            data[at:at] = data[at : at + 40] * draw(st.integers(1, 3))
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("target", NAMES)
def test_any_bytes(target: str) -> None:
    @FEW
    @given(st.binary(max_size=200) | spoilt(target))
    def check(data: bytes) -> None:
        targets.run(target, data)

    check()


@pytest.mark.parametrize("target", NAMES)
def test_the_corpus(target: str) -> None:
    """What fuzzers and readers of the code found once; each within a second."""
    assert targets.seeds(target)
    for data in targets.seeds(target):
        started = time.process_time()
        targets.run(target, data)
        assert time.process_time() - started < 1


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


MANIFEST = json.loads(targets.small_manifest())


@FEW
@given(st.sampled_from(places(MANIFEST)[1:]), JSON)
def test_any_value_in_any_field_of_the_manifest(place: tuple[Any, ...], value: Any) -> None:
    data = json.loads(json.dumps(MANIFEST))
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    targets.run("manifest", json.dumps(data).encode())


def test_the_seeds_are_sound() -> None:
    """Or the tests above would see refusals alone."""
    for target in set(NAMES) - {"traffic"}:
        assert targets.run(target, targets.seeds(target)[-1]), target
    assert targets.run("traffic", b'{"text": "x"}')


def bomb(start: str, first: str, step: str) -> str:
    """YAML whose aliases expand to 10^9 values."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {step.format(*[f'*a{i - 1}'] * 10)}" for i in range(1, 10)]
    return "\n".join([*lines, start])


TEN = "[" + ", ".join(["{}"] * 10) + "]"


@pytest.mark.parametrize(
    "text",
    [
        bomb("name: *a9", "x", TEN),
        bomb("model:\n  <<: *a9", "{x: 1}", "{{<<: " + TEN + "}}"),
        "name: &a [*a]",
        "model: &a {path: *a}",
        "[" * 100_000,
        "x: " + "9" * 5_000,
        "x: !!python/object/apply:os.system ['true']",
        "name: " + "x" * 200_000,
    ],
    ids=["aliases", "merges", "itself", "itself in keys", "depth", "a long number", "a Python object", "size"],
)
def test_recipes_that_blow_up_are_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(GsrqError):
        parse_recipe(text, "hostile.yaml", Path("/nowhere"))
    assert time.process_time() - started < 2


def test_aliases_that_do_not_multiply_are_fine() -> None:
    text = (
        "name: x\nmodel: {path: m}\ntraffic: {sources: [{kind: self}]}\n"
        "codec: {keys: &side {width: 64, stages: 4}, values: *side}\n"
    )
    recipe = parse_recipe(text, "r.yaml", None)
    assert recipe.codec.keys == recipe.codec.values


def test_paths_of_a_recipe() -> None:
    """A home that there is not is an error; a stranger's recipe is read without looking at the disk."""
    for path in ("~nobody-such/m", "../../../**/*"):
        text = f"name: x\nmodel: {{path: m}}\ntraffic: {{sources: [{{kind: text, path: '{path}'}}]}}\n"
        assert parse_recipe(text, "r.yaml", None).traffic.sources[0].path == path  # type: ignore[union-attr]
    text = text.replace(path, "~nobody-such/m")
    with pytest.raises(GsrqError, match=r"~nobody-such/m.*home"):
        parse_recipe(text, "r.yaml", Path("/nowhere"))


# Calls that run code, or a shell, from data.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "marshal.loads", "torch.load", "joblib.load", "dill.load", "shelve.open", "yaml.unsafe_load", "yaml.full_load",
    "subprocess.getoutput",
}  # fmt: skip
ALLOWED = {("gsrq_export/native.py", "__import__")}  # of two fixed names


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def code_faults(name: str, text: str) -> list[str]:
    """Uses of pickle, eval, a shell or remote code in Python sources."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{name}: imports {m}" for m in modules if m.split(".")[0] in {"pickle", "dill", "marshal"}]
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        arguments = {k.arg: k.value for k in node.keywords}
        on = {k for k, v in arguments.items() if not (isinstance(v, ast.Constant) and v.value is False)}
        if called in FORBIDDEN and (name, called) not in ALLOWED:
            found.append(f"{name}:{node.lineno}: {called}")
        found += [f"{name}:{node.lineno}: {k}" for k in on & {"shell", "allow_pickle", "trust_remote_code"}]
        if called in ("np.load", "numpy.load") and "allow_pickle" not in arguments:
            found.append(f"{name}:{node.lineno}: np.load without allow_pickle=False")
        if called.startswith("Auto") and called.endswith("from_pretrained") and "trust_remote_code" not in arguments:
            found.append(f"{name}:{node.lineno}: {called} without trust_remote_code=False")
        if called == "yaml.load" and not (len(node.args) == 2 and dotted(node.args[1]) == "_StrictLoader"):
            found.append(f"{name}:{node.lineno}: yaml.load")
    return found


def test_no_pickle_no_eval_no_shell_no_remote_code() -> None:
    sources = [*(ROOT / "gsrq_export").rglob("*.py"), ROOT / "cli.py"]
    assert len(sources) > 100
    found = [f for path in sources for f in code_faults(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert found == []
    native = [p for p in (ROOT / "plugins").rglob("*") if p.suffix in (".cpp", ".hpp", ".h", ".cu", ".cuh")]
    assert len(native) > 30
    calls = re.compile(r"\b(system|popen|execl\w*|execv\w*|strcpy|strcat|sprintf|gets)\s*\(")
    assert [p.name for p in native if calls.search(p.read_text())] == []


def test_the_scan_sees_what_it_should() -> None:
    bad = (
        "import pickle", "eval('1')", "os.system('x')", "subprocess.run('x', shell=True)", "np.load(f)",
        "torch.load(f)", "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(d)", "yaml.load(t, yaml.Loader)",
        "AutoConfig.from_pretrained(d, trust_remote_code=flag)",
    )  # fmt: skip
    assert [line for line in bad if not code_faults("x.py", line)] == []
    assert code_faults("x.py", "np.load(f, allow_pickle=False); model.eval(); re.compile('x')") == []

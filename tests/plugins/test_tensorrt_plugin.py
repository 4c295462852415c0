"""The TensorRT plugin without a GPU: what a builder asks it, what a plan holds, what is refused; TensorRT's lean
runtimes, which load it.

GSRQ_TENSORRT_LEAN names folders, separated as PATH is, into each of which one version's tensorrt-lean was installed
(pip install --no-deps --target DIR tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs, both of that version).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trt_harness
from attention_cases import CASES, ROTATED, Case
from op_tensors import FEEDS
from trt_harness import Desc, Harness, Plugin, descs, input_tensors

from gsrq_export import native
from gsrq_export.cache.reference import attributes
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cuda import library
from gsrq_export.errors import GsrqError

LEAN = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import tensorrt_lean_bindings as trt
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[2])
creator = registry.get_creator("GsrqAttention", "1", "ai.gsrq")
kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
def create(phase, **given):
    fields = [trt.PluginField(n, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for n, v in given.items()]
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), phase)
print(trt.__version__, [f.name for f in creator.field_names])
for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
    plugin = create(phase, scale=0.25, sinks=4, window=8, block=4, key_frame=1)
    kinds_of = trt.PluginCapabilityType
    core = plugin.get_capability_interface(kinds_of.CORE)
    print(core.plugin_name, core.plugin_version, core.plugin_namespace)
    print(*(type(plugin.get_capability_interface(k)).__name__ for k in (kinds_of.BUILD, kinds_of.RUNTIME)))
print(create(trt.TensorRTPhase.BUILD, scale=0.25, sinks=4, window=8, block=0))
sys.stdout.flush()
os._exit(0)  # the runtime's own exit handlers want a GPU
"""


# What a plan holds of attributes that nodes of the first libraries lack.
LATER = {"key_frame": "int 0", "code_order": "int 0"}
BY_HEAD = replace(
    ROTATED[0], name="by head", config=replace(CASES[0].config, rule=CacheRule(2, 5, 8), codes_by_head=True)
)


@pytest.fixture(params=[10, 11])
def host(request: pytest.FixtureRequest) -> Harness:
    return trt_harness.harness(request.param)


def made(host: Harness, case: Case, **changes: int | float) -> Plugin:
    plugin = host.create(attributes(case.config, case.rotated) | changes)
    assert plugin is not None, host.messages()
    return plugin


def call(case: Case, io: torch.dtype = torch.float32) -> tuple[list[Desc], list[Desc]]:
    data = case.data()
    feeds = dict(zip(FEEDS[:3], (x.to(io) for x in (data.query, data.key, data.value)), strict=True))
    feeds |= {"cos": data.cos, "sin": data.sin, "past_lengths": data.lengths, "new_lengths": data.lengths}
    return descs(input_tensors(case, feeds, vars(case.empty())))


@pytest.mark.parametrize("case", [*CASES, *ROTATED, BY_HEAD], ids=str)
def test_attributes_survive_a_plan_and_copies(host: Harness, case: Case) -> None:
    given = attributes(case.config, case.rotated)
    plugin = made(host, case)
    expected = {
        n: f"{'float' if isinstance(v, float) else 'int'} {v:f}" for n, v in given.items() if isinstance(v, float)
    }
    expected |= {n: f"int {v}" for n, v in given.items() if not isinstance(v, float)}
    for copy in (plugin, plugin.another("clone"), plugin.another("attach"), plugin.another("reload").another("clone")):
        held = dict(line.split(" ", 1) for line in copy.text("serialized"))
        assert held == {**LATER, **expected}
    name, build, cache_id, fields = plugin.text("identity")
    assert (name, build) == ("ai.gsrq GsrqAttention 1", "PLUGIN_V3ONE_BUILD 2")
    assert set(fields.split()) == {*given, *LATER}
    assert all(f"{n}=" in cache_id for n in given)
    assert plugin.aliased() == [-1, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block": 0}, "attribute block is 0"),
        ({"scale": 0.0}, "attribute scale is 0, must be positive"),
        ({"scale": 1}, "attribute scale must be a float"),
        ({"sinks": 1.5}, "attribute sinks must be an int"),
        ({"key_frame": 2}, "attribute key_frame is 2, must be 0 or 1"),
        ({"code_order": 2}, "attribute code_order is 2, must be 0 or 1"),
        ({"code_order": 1}, "attribute block is 4, must be a multiple of 8 where code_order is 1"),
        ({"rope_interleaved": -1}, "attribute rope_interleaved is -1, must be 0 or 1"),
        ({"beam": 5000}, "attribute beam is 5000"),
        ({"unheard": 1}, "attribute unheard is unknown"),
    ],
)
def test_attributes_are_checked(host: Harness, changes: dict[str, int | float], said: str) -> None:
    assert host.create(attributes(CASES[0].config) | changes) is None
    assert said in host.messages()


@pytest.mark.parametrize("name", ["scale", "sinks", "window", "block"])
def test_an_attribute_without_a_default_must_be_given(host: Harness, name: str) -> None:
    given = attributes(CASES[0].config)
    del given[name]
    assert host.create(given) is None
    assert f"attribute {name} is missing" in host.messages()
    optional = {n: v for n, v in attributes(CASES[0].config).items() if n in ("scale", "sinks", "window", "block")}
    plugin = host.create(optional)
    assert plugin is not None
    assert "beam int 1" in plugin.text("serialized")


@pytest.mark.parametrize("case", [CASES[0], ROTATED[1]], ids=str)
@pytest.mark.parametrize("io", [torch.float32, torch.float16, torch.bfloat16])
def test_types_and_shapes_of_outputs(host: Harness, case: Case, io: torch.dtype) -> None:
    case = replace(case, exact_dtype=io)
    inputs, outputs = call(case, io)
    plugin = made(host, case)
    assert plugin.output_types([t for t, _ in inputs]) == [t for t, _ in outputs]
    shapes = plugin.output_shapes(inputs)
    assert shapes[0] == [0, 2, 1, 3]
    assert shapes[1:] == [[8 * i + d for d in range(len(inputs[i][1]))] for i in range(7, 11)]
    everything = [*inputs, *outputs]
    assert all(plugin.supports(everything, pos) for pos in range(len(everything)))
    for pos, (right, shape) in enumerate(everything):
        assert not plugin.supports(everything, pos, {pos: 1}), "a format that is not linear"
        for wrong in set(trt_harness.TYPES) - {right}:
            changed = [*everything[:pos], (wrong, shape), *everything[pos + 1 :]]
            free = pos in (0, 9) and wrong.is_floating_point and (pos == 0 or io == torch.float32)
            assert plugin.supports(changed, pos) == free, (pos, wrong)


SPOILT = [
    (CASES[0], {0: (3, 4, 37, 15)}, "head_dim must be even"),
    (CASES[0], {1: (3, 3, 37, 16)}, "must be a multiple of key's 3"),
    (CASES[0], {5: (4,)}, "past_lengths has shape [4], expected [3]"),
    (CASES[0], {8: (3, 36, 5)}, "value_codes has shape"),
    (CASES[0], {9: (3, 2, 10, 16)}, "key_exact has shape"),
    (CASES[0], {11: (2, 3, 255, 16)}, "key_codebooks has shape"),
    (CASES[0], {13: (2, 16, 15)}, "key_transform has shape"),
    (BY_HEAD, {7: (3, 31, 6), 8: (3, 31, 2)}, "key_codes has shape [3, 31, 6]: capacity must be a multiple of 8"),
]


@pytest.mark.parametrize(("case", "spoil", "said"), SPOILT, ids=str)
def test_shapes_are_checked(host: Harness, case: Case, spoil: dict[int, tuple[int, ...]], said: str) -> None:
    inputs, outputs = call(case)
    plugin = made(host, case)
    assert plugin.shape_change(inputs, outputs) == 0, host.messages()
    changed = [(dtype, spoil.get(i, shape)) for i, (dtype, shape) in enumerate(inputs)]
    assert plugin.shape_change(changed, outputs) != 0
    assert said in host.messages()
    assert plugin.configure(changed, outputs) != 0
    said_again = host.messages()
    assert "at the largest shapes: " in said_again
    assert said in said_again


def test_counts_and_types_of_inputs_are_checked(host: Harness) -> None:
    inputs, outputs = call(CASES[0])
    plugin = made(host, CASES[0])
    assert plugin.shape_change(inputs[:-1], outputs) != 0
    assert "14 inputs are given, attribute key_frame 0 needs 15" in host.messages()
    assert plugin.configure(call(ROTATED[0])[0], outputs) != 0
    assert "16 inputs are given" in host.messages()
    assert plugin.shape_change([*inputs[:5], (torch.float32, inputs[5][1]), *inputs[6:]], outputs) != 0
    assert "past_lengths has a type" in host.messages()
    varying = {11: (4, *inputs[11][1][1:])}
    assert plugin.configure(inputs, outputs, varying) != 0
    assert "key_codebooks must be a constant" in host.messages()


def test_where_the_kernels_are_looked_for(host: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy of the plugin looks once."""
    kernels = native.find(native.CUDA)
    inputs, outputs = call(CASES[0])
    for i, (named, said) in enumerate(
        [
            (str(tmp_path / "nothing.so"), "the kernels cannot be loaded"),
            (str(host.plugin), f"has interface version none, this plugin needs {library.ABI}"),
            ("", "libgsrq_cuda.so: cannot open"),
            ("", None),
        ]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.setenv(native.CUDA.variable, named)
        if said is None:
            if kernels is None:
                pytest.skip("no CUDA library is built: gsrq plugins build --cuda")
            shutil.copy(kernels, folder / native.CUDA.library)
        opened = Harness(Path(host.path), Path(shutil.copy(host.plugin, folder)))
        plugin = made(opened, CASES[0])
        failed = plugin.configure(inputs, outputs)
        messages = opened.messages()
        assert (failed, plugin.workspace(inputs, outputs) > 0) == (said is not None, said is None)
        assert said is None or (said in messages and "GSRQ_CUDA_LIBRARY" in messages)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], ROTATED[0]], ids=str)
def test_the_workspace_covers_every_smaller_call(host: Harness, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels for several tokens; those of decoding need a GPU to be chosen."""
    kernels = native.find(native.CUDA)
    if kernels is None:
        pytest.skip("no CUDA library is built: gsrq plugins build --cuda")
    monkeypatch.setenv(native.CUDA.variable, str(kernels))
    inputs, outputs = call(case)
    plugin = made(host, case)

    def sized(batch: int, steps: int) -> list[Desc]:
        def shape(i: int, old: tuple[int, ...]) -> tuple[int, ...]:
            if i in (3, 4) or i >= 11:
                return old
            return (batch, old[1], steps, old[3]) if i < 3 else (batch, *old[1:])

        return [(dtype, shape(i, tuple(old))) for i, (dtype, old) in enumerate(inputs)]

    whole = sized(5, 40)
    assert plugin.configure(whole, outputs) == 0, host.messages()
    most = plugin.workspace(whole, outputs)
    sizes = [plugin.workspace(sized(b, t), outputs) for b in range(1, 6) for t in (1, 2, 7, 16, 17, 39)]
    assert 0 < min(sizes) <= max(sizes) <= most, host.messages()


@pytest.mark.parametrize("major", [10, 11])
def test_the_lean_runtime_loads_it_and_makes_plugins(major: int) -> None:
    folders = [Path(f) for f in os.environ.get("GSRQ_TENSORRT_LEAN", "").split(os.pathsep) if f]
    lean = next((f for f in folders if (f / "tensorrt_lean_libs" / f"libnvinfer_lean.so.{major}").is_file()), None)
    if lean is None:
        pytest.skip(f"no tensorrt-lean {major}: name its folder in GSRQ_TENSORRT_LEAN")
    plugin = trt_harness.harness(major).plugin
    environment = {**os.environ, "LD_LIBRARY_PATH": str(lean / "tensorrt_lean_libs")}
    result = subprocess.run(
        [sys.executable, "-c", LEAN, lean, plugin], capture_output=True, text=True, check=True, env=environment
    )
    version, *lines = result.stdout.splitlines()
    assert version.startswith(f"{major}.")
    assert "'scale'" in version
    assert lines == ["GsrqAttention 1 ai.gsrq", "IPluginV3OneBuildV2 IPluginV3OneRuntime"] * 2 + ["None"]
    assert "attribute block is 0, must be 1 or more" in result.stderr


def test_headers_are_checked(tmp_path: Path) -> None:
    with pytest.raises(GsrqError, match=r"has no NvInferVersion\.h"):
        native.tensorrt_target(tmp_path)
    file = tmp_path / "NvInferVersion.h"
    for text, target in (
        ("#define NV_TENSORRT_MAJOR 10 //\n#define NV_TENSORRT_MINOR 3 //\n", native.TENSORRT[10]),
        ("#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 0\n", native.TENSORRT[11]),
        ("#define NV_TENSORRT_MAJOR 10 //\n#define NV_TENSORRT_MINOR 2 //\n", None),
        ("#define NV_TENSORRT_MAJOR 12 //\n#define NV_TENSORRT_MINOR 0 //\n", None),
        ("nothing", None),
    ):
        file.write_text(text)
        if target is not None:
            assert native.tensorrt_target(tmp_path) is target
            other = native.TENSORRT[21 - int(target.library[-5:-3])]
            with pytest.raises(GsrqError, match="is not for the TensorRT of"):
                native.build(target=other, tensorrt_headers=tmp_path)
        else:
            with pytest.raises(GsrqError, match="is of TensorRT"):
                native.tensorrt_target(tmp_path)
    with pytest.raises(GsrqError, match="give them for a TensorRT plugin"):
        native.build(target=native.ORT, tensorrt_headers=tmp_path)
    with pytest.raises(GsrqError, match="give them for a TensorRT plugin"):
        native.build(target=native.TENSORRT[10])

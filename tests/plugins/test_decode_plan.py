"""How the CUDA decode is cut over a cluster: plain arithmetic, so a C++ compiler is enough to test it."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gsrq_export import native

COMPILER = shutil.which(os.environ.get("CXX", "c++")) or "c++"
FIELDS = (
    *("slices", "planes", "splits", "cluster", "blocks", "all_blocks", "slots", "slots_per_cta", "ways", "owners"),
    *("width", "group", "parts", "part_heads", "lanes", "own_tiles", "stride", "buffers", "shared_bytes"),
)
PROGRAM = f"""
#include <initializer_list>
#define __host__
#define __device__
#include "decode_plan.hpp"
extern "C" int plan(int heads, int kv_heads, int head_dim, int key_width, int key_stages, int planes, int value_width,
                    int value_stages, int geometric, int* out, int* tiles) {{
  gsrq_layer layer{{}};
  layer.heads = heads;
  layer.kv_heads = kv_heads;
  layer.head_dim = head_dim;
  layer.geometric = geometric;
  layer.keys.width = key_width;
  layer.keys.stages = key_stages;
  layer.keys.planes = planes;
  layer.values.width = value_width;
  layer.values.stages = value_stages;
  gsrq::cuda::DecodePlan p;
  if (!gsrq::cuda::make_decode_plan(layer, &p)) return 0;
  int i = 0;
  for (int value : {{{", ".join(f"p.{name}" for name in FIELDS)}}}) out[i++] = value;
  for (int owner = 0; owner < p.owners; ++owner) tiles[owner] = p.tiles_of(owner);
  return 1;
}}
"""
Plan = Callable[..., tuple[dict[str, int], list[int]] | None]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    source, shared = folder / "plan.cpp", folder / "plan.so"
    source.write_text(PROGRAM)
    root: Path = native.source_dir()
    include = [f"-I{root / 'include'}", f"-I{root / 'src/cuda'}"]
    subprocess.run([COMPILER, "-std=c++17", "-shared", "-fPIC", *include, str(source), "-o", str(shared)], check=True)
    library = ctypes.CDLL(str(shared))

    def run(*arguments: int) -> tuple[dict[str, int], list[int]] | None:
        out, tiles = (ctypes.c_int * len(FIELDS))(), (ctypes.c_int * 16)()
        if not library.plan(*arguments, out, tiles):
            return None
        found = dict(zip(FIELDS, out, strict=True))
        return found, list(tiles[: found["owners"]])

    return run


def test_every_plan_covers_the_work_and_fits(plan: Plan) -> None:
    shapes = itertools.product((1, 2, 3, 5, 8, 12, 16), (32, 64, 96, 128, 256), (1, 7, 12, 16, 20, 32), (1, 2), (1, 2))
    planned = 0
    for group, head_dim, stages, planes, joined in shapes:
        for value_width in (head_dim // 2, head_dim, 2 * head_dim):
            found = plan(2 * group, 2, head_dim, joined * head_dim, stages, planes, value_width, stages, 1)
            if found is None:
                continue
            planned += 1
            p, tiles = found
            assert p["cluster"] == p["slices"] * p["planes"] * p["splits"] == p["ways"] * p["owners"] <= 16
            assert p["slices"] * 32 == head_dim
            assert p["blocks"] in (1, 2, 3, 4, 6)  # kernels exist for these
            assert p["blocks"] * p["splits"] >= p["all_blocks"] == -(-stages // 4)
            assert p["slots"] == stages * max(1, head_dim // value_width) <= p["ways"] * p["slots_per_cta"]
            assert p["part_heads"] <= p["lanes"]
            assert p["parts"] * p["part_heads"] >= group > (p["parts"] - 1) * p["part_heads"]
            assert (p["lanes"], p["stride"]) in ((1, 32), (4, 32), (4, 64), (8, 64))
            assert p["slots_per_cta"] * p["lanes"] <= p["stride"]
            assert sum(tiles) == 16
            assert max(tiles) == p["own_tiles"]
            assert p["shared_bytes"] <= 227 * 1024
            scores = p["cluster"] * p["own_tiles"] * 16 * p["lanes"] * 4  # bytes of a chunk's, in each block
            assert p["buffers"] == 8 or (p["buffers"] == 4 and p["shared_bytes"] + 4 * scores > 227 * 1024)
    assert planned > 200


def test_the_common_shape_takes_a_cluster_of_four(plan: Plan) -> None:
    found = plan(32, 8, 128, 128, 16, 1, 128, 16, 1)  # LLaMA-3-8B at one bit, int8 codewords
    assert found is not None
    assert {name: found[0][name] for name in ("cluster", "blocks", "ways", "parts", "stride", "buffers")} == {
        "cluster": 4,
        "blocks": 4,
        "ways": 1,
        "parts": 1,
        "stride": 64,
        "buffers": 8,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (32, 8, 128, 64, 16, 1, 128, 16, 1),  # keys coded by half heads
        (32, 8, 80, 80, 16, 1, 80, 16, 1),  # not whole slices of 32 dims
        (32, 8, 128, 128, 16, 1, 128, 16, 0),  # a rotary table that does not turn by position
        (32, 8, 128, 128, 16, 0, 128, 16, 1),  # codebooks not inspected
        (32, 8, 256, 256, 250, 2, 256, 4, 1),  # no cluster holds the codebook
    ],
)
def test_what_the_fast_decode_leaves_to_prefill(plan: Plan, arguments: tuple[int, ...]) -> None:
    assert plan(*arguments) is None

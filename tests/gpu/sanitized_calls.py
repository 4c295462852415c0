"""A few small calls of every kernel, to be run under compute-sanitizer; test_cuda_kernels.py does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from cuda_calls import TILE_CASES, by_head, layer_of_case  # noqa: E402
from cuda_scenes import Scene, Stage, with_config  # noqa: E402
from served_rows import Pool, step_of  # noqa: E402

from gsrq_export.cuda import Call  # noqa: E402
from gsrq_export.cuda.rows import attention_rows  # noqa: E402

SMALL = Scene((301, 17, 0), (1, 1, 1), head_dim=64, half_rope=32, keys=(64, 5), values=(64, 3))
BY_HEAD = with_config(SMALL, codes_by_head=True)
WIDE = replace(BY_HEAD, past=(1301, 17, 0), head_dim=128, half_rope=64, heads=8, keys=(128, 16), values=(128, 16))
SCENES = [
    SMALL,
    replace(SMALL, grid=False, page=8, dtype=torch.bfloat16),
    replace(SMALL, rope="random", values=(128, 2), dtype=torch.float32),
    replace(BY_HEAD, new=(41, 3, 20), keys=(32, 3)),
    with_config(replace(BY_HEAD, new=(20, 0, 9), dtype=torch.float32, page=16), beam=3, exact_prefill=True),
    replace(SMALL, head_dim=128, half_rope=32, keys=(128, 17), values=(64, 9), heads=14),
    WIDE,
    replace(WIDE, page=16),
    replace(WIDE, page=32, values=(128, 8), rotated=True),
    replace(BY_HEAD, past=(701, 17, 0), rotated=True),
    replace(SMALL, rotated=True, grid=False, page=8, rope="random", dtype=torch.bfloat16, heads=14),
    replace(SMALL, rotated=True, new=(41, 3, 20), head_dim=128, keys=(256, 8), values=(128, 16)),
]


def main() -> None:
    for scene in SCENES:
        stage = Stage(scene, "cuda")
        Call(stage.layer, stage.call()).run()
        stage.layer.encode(torch.randn(33, scene.kv_heads * scene.head_dim, device="cuda"), "keys")
        torch.cuda.synchronize()
    case = by_head(TILE_CASES[0])
    pool, data, done = Pool(case, layer_of_case(case, case.data(), "cuda")), case.data(), [0, 0, 0]
    for new, spread in (([14, 7, 0], 0), ([1, 1, 1], 3)):
        tokens, rows, output = step_of(case, data, done, new, torch.float16, "cuda", spread)
        pool.attend(attention_rows, tokens, rows, output)
        torch.cuda.synchronize()
        done = new
    print(f"ran {len(SCENES) + 2} calls")


if __name__ == "__main__":
    main()

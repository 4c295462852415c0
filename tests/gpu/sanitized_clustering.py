"""A few small steps of clustering, to be run under compute-sanitizer; test_cuda_cluster.py does."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gsrq_export.cuda.cluster import assign, update

SHAPES = [(2, 301, 128), (1, 1100, 16), (1, 77, 31), (1, 70, 130), (1, 65, 256), (1, 33, 512)]


def main() -> None:
    for groups, rows, width in SHAPES:
        x = torch.randn(groups, rows, width, device="cuda")
        words = torch.randn(groups, 256, width, device="cuda")
        weights, norms = torch.rand(groups, rows, device="cuda"), x.norm(dim=2)
        codes = assign(x, words, weights).codes
        update(x, codes, "gain-shape", weights, norms, words)
        update(x, codes, "means")
        torch.cuda.synchronize()
    print(f"ran {len(SHAPES)} steps")


if __name__ == "__main__":
    main()

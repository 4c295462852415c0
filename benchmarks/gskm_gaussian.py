"""Gain-shape k-means against k-means in residual quantization of Gaussian vectors (Figure 4 of arXiv 2607.01065).

    python benchmarks/gskm_gaussian.py

Isotropic vectors over a sweep of dimension and stages, anisotropic ones over the spectrum's slope. k-means gets
every fair start: data points (the usual one), k-means++, data points shrunk towards the mean, and GSKM's own
directions. Each seed draws new vectors and new starts; distortion is squared error over energy on rows that were not
trained on. Writes benchmarks/results/gskm_gaussian.json and two plots under docs/img.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment
from markupsafe import Markup

from gsrq_export.cache.rule import CODEBOOK_SIZE
from gsrq_export.codec.cluster import cluster, nearest
from gsrq_export.codec.codebook import Codebook
from gsrq_export.report.svg import Axis, Curve, plot

Trainer = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]
SHRINK = 0.1  # of seeds near the mean
SEED_ROWS = 4096  # that k-means++ draws from
DIMENSIONS = {16: 4, 64: 8, 128: 16}  # dimension: stages; 8 stages of 64 and 16 of 128 are one bit
SLOPES = (0.0, 1.0, 2.0)  # variance of channel i is i ** -slope, at SLOPE_DIMENSION dimensions
SLOPE_DIMENSION = 64


def lloyd(x: torch.Tensor, words: torch.Tensor, iterations: int) -> torch.Tensor:
    """Plain k-means from given codewords; the best iterate. A codeword that nothing is near stays where it is."""
    best, least = words, math.inf
    for step in range(iterations + 1):
        index, gain = nearest(x, words)
        error = -float(gain.sum(dtype=torch.float64))  # up to the energy of x
        if error < least:
            best, least = words, error
        if step < iterations:
            count = torch.bincount(index, minlength=len(words))
            total = torch.zeros_like(words).index_add_(0, index, x)
            words = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], words)
    return best


def points(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=generator)[:CODEBOOK_SIZE]]


def plus_plus(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): seeds drawn in proportion to the squared distance to those before."""
    x = x[:SEED_ROWS]
    norms = (x**2).sum(1)
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    left = torch.full_like(norms, math.inf)
    for _ in range(CODEBOOK_SIZE - 1):
        seed = x[chosen[-1]]
        left = torch.minimum(left, (norms - 2 * (x @ seed) + (seed @ seed)).clamp(min=0))
        chosen.append(int(torch.multinomial(left.clamp(min=1e-30), 1, generator=generator)))
    return x[chosen]


def built_in(method: Any) -> Trainer:
    return lambda x, n, generator: cluster(x, torch.ones(len(x)), method, n, generator).words


TRAINERS: dict[str, Trainer] = {
    "GSKM": built_in("gskm"),
    "k-means, data points": built_in("kmeans"),
    "k-means++": lambda x, n, generator: lloyd(x, plus_plus(x, generator), n),
    "k-means, small norms": lambda x, n, generator: lloyd(x, SHRINK * points(x, generator), n),
    "k-means, directions": built_in("kmeans-spherical"),
}
STYLES = dict(zip(TRAINERS, ("coded", "value", "fourth", "third", "exact"), strict=True))


def residual(
    train: torch.Tensor, held: torch.Tensor, trainer: Trainer, stages: int, iterations: int, generator: torch.Generator
) -> tuple[list[float], list[float], list[float], torch.Tensor]:
    """By stage: distortion on the training and on the held-out rows, and the share of the training rows that the most
    used codeword takes; and the codewords [R, 256, D].
    """
    energy = [float((x.double() ** 2).sum()) for x in (train, held)]
    rest, log, top, words = [train, held], ([], []), [], []
    for _ in range(stages):
        words.append(trainer(rest[0], iterations, generator))
        for i in range(2):
            index = nearest(rest[i], words[-1])[0]
            if i == 0:
                top.append(float(torch.bincount(index).max()) / len(index))
            rest[i] = rest[i] - words[-1][index]
            log[i].append(float((rest[i].double() ** 2).sum()) / energy[i])
    return log[0], log[1], top, torch.stack(words)


def vectors(rows: int, dimension: int, slope: float, seed: int) -> torch.Tensor:
    scale = torch.arange(1, dimension + 1) ** (-slope / 2)
    return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)) * scale


def check() -> None:
    """A small case against plain loops: each method's distortion, assignments, one update of k-means."""
    x = vectors(320, 3, 1.0, 0)
    train, held = x[:280], x[280:]
    for name, trainer in TRAINERS.items():
        _, found, _, words = residual(train, held, trainer, 2, 3, torch.Generator().manual_seed(1))
        error = energy = 0.0
        for row in held.tolist():
            energy += sum(v * v for v in row)
            for stage in words.tolist():
                word = min(stage, key=lambda w: sum((a - b) ** 2 for a, b in zip(row, w, strict=True)))
                row = [a - b for a, b in zip(row, word, strict=True)]
            error += sum(v * v for v in row)
        assert math.isclose(found[-1], error / energy, rel_tol=1e-5), (name, found[-1], error / energy)
    start = points(x, torch.Generator().manual_seed(2))
    index = [min(range(len(start)), key=lambda k: float(((row - start[k]).double() ** 2).sum())) for row in x[:100]]
    assert nearest(x[:100], start)[0].tolist() == index
    moved = lloyd(x[:100], start, 1)
    for k in set(index):
        members = [x[i] for i in range(100) if index[i] == k]
        assert torch.allclose(moved[k], sum(members) / len(members), atol=1e-6)


def case(dimension: int, stages: int, slope: float, args: argparse.Namespace) -> dict[str, Any]:
    """All methods on the same vectors, seed by seed."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    for seed in range(args.seeds):
        x = vectors(args.rows + args.held_out, dimension, slope, 1000 * seed + dimension)
        train, held = x[: args.rows], x[args.rows :]
        for name, trainer in TRAINERS.items():
            start = time.process_time()
            generator = torch.Generator().manual_seed(seed)
            on_train, on_held, top, words = residual(train, held, trainer, stages, args.iterations, generator)
            # Training rows may be coded exactly, each by a codeword of its own; unseen ones may not.
            assert all(0 <= v < 1 for v in on_train), (name, dimension, slope, on_train)
            assert all(0 < v < 1 for v in on_held), (name, dimension, slope, on_held)
            run = {
                "train": on_train,
                "held_out": on_held,
                "top_share": top,
                "processor_seconds": round(time.process_time() - start, 2),
            }
            if name in ("GSKM", "k-means, directions"):
                book = Codebook(words[None].half(), torch.eye(dimension)[None])
                left = held - book.decode(book.encode(held, 4))
                run["held_out_beam_4"] = float((left.double() ** 2).sum() / (held.double() ** 2).sum())
            runs[name].append(run)
    return {"dimension": dimension, "stages": stages, "slope": slope, "methods": runs}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def standalone(chart: Markup) -> str:
    """A chart as a file of its own: with its colours, wide enough for a document."""
    css = (ROOT / "gsrq_export/report/chart.css").read_text()
    text = str(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="480" ', 1)
    return text.replace("</title>", f"</title><style>{css}svg {{ background: var(--card); }}</style>", 1) + "\n"


def plots(rows: list[dict[str, Any]]) -> dict[str, str]:
    """SVG files by name: distortion by stages, and by the slope of the spectrum."""

    def picture(title: str, x_axis: Axis, y_label: str, of: Callable[[str], list[tuple[float, list[float]]]]) -> str:
        curves = []
        for method, style in reversed(STYLES.items()):  # GSKM last, above the curves that it meets
            figures = [(x, *spread(values)) for x, values in of(method)]
            low, high = [m - s for _, m, s in figures], [m + s for _, m, s in figures]
            curves.append(Curve(method, style, [(x, m) for x, m, _ in figures], low, high))
        return standalone(plot(title, x_axis, Axis(y_label), curves))

    widest = max((r for r in rows if r["slope"] == 0), key=lambda r: r["dimension"])
    slopes = sorted((r for r in rows if r["dimension"] == SLOPE_DIMENSION), key=lambda r: r["slope"])

    def by_stage(method: str) -> list[tuple[float, list[float]]]:
        runs = widest["methods"][method]
        return [(r + 1.0, [run["held_out"][r] for run in runs]) for r in range(widest["stages"])]

    def over_gskm(method: str) -> list[tuple[float, list[float]]]:
        """Per cent, seed by seed on the same vectors."""
        pairs = [(row["slope"], zip(row["methods"][method], row["methods"]["GSKM"], strict=True)) for row in slopes]
        return [(x, [100 * (a["held_out"][-1] / b["held_out"][-1] - 1) for a, b in runs]) for x, runs in pairs]

    return {
        "gskm_stages.svg": picture(
            f"Isotropic Gaussians, D = {widest['dimension']}: distortion by stages",
            Axis("stages of 256 codewords"),
            "squared error / energy, held out",
            by_stage,
        ),
        "gskm_slopes.svg": picture(
            f"Gaussians, D = {SLOPE_DIMENSION}, {slopes[0]['stages']} stages: distortion over that of GSKM by slope",
            Axis("slope of the spectrum", ticks=[(s, f"{s:g}") for s in SLOPES]),
            "error above that of GSKM, %",
            over_gskm,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384, help="vectors trained on")
    parser.add_argument("--held-out", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gskm_gaussian.json")
    args = parser.parse_args()
    begin = time.process_time()
    check()
    settings = {"rows": args.rows, "held_out": args.held_out, "iterations": args.iterations, "seeds": args.seeds}
    rows = []
    todo = [(d, stages, 0.0) for d, stages in DIMENSIONS.items()]
    todo += [(SLOPE_DIMENSION, DIMENSIONS[SLOPE_DIMENSION], s) for s in SLOPES if s]
    for dimension, stages, slope in todo:
        rows.append(case(dimension, stages, slope, args))
        last = {m: spread([run["held_out"][-1] for run in runs])[0] for m, runs in rows[-1]["methods"].items()}
        figures = ", ".join(f"{m} {v:.4f}" for m, v in last.items())
        print(f"D={dimension} R={stages} slope {slope:g}: {figures}; {time.process_time() - begin:.0f} s", flush=True)
    processor_seconds = round(time.process_time() - begin, 1)
    data = {"environment": environment(), "settings": settings, "processor_seconds": processor_seconds, "rows": rows}
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    for name, text in plots(rows).items():
        (ROOT / "docs/img" / name).write_text(text)


if __name__ == "__main__":
    main()

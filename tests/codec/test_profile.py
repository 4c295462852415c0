"""The profile of a codebook against a plain loop over its vectors."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from attention_cases import random_codebook

from gsrq_export.codec.codebook import ENCODE_CHUNK, Codebook
from gsrq_export.codec.profile import Profile, profile_codebook
from gsrq_export.errors import GsrqError

HEADS, WIDTH, LENGTH = 4, 16, 100


def vectors(rows: int, elements: int = HEADS * WIDTH) -> torch.Tensor:
    """Heads and positions of different energy, so that shares cannot be mixed up unnoticed."""
    x = torch.randn(rows, elements, generator=torch.Generator().manual_seed(5))
    x *= (1 + torch.arange(elements) // WIDTH) / 2
    return (x * (1 + (torch.arange(rows) % LENGTH)[:, None] / LENGTH)).half()


def squared(values: list[float]) -> float:
    return math.fsum(v * v for v in values)


def by_hand(book: Codebook, x: torch.Tensor, beam: int) -> dict[str, object]:
    """Every figure, one vector and element at a time, in Python floats."""
    stage_error = [0.0] * book.stages
    metric_error = [0.0] * book.stages
    energy = metric_energy = 0.0
    heads = [[0.0, 0.0] for _ in range(HEADS)]
    buckets: dict[int, list[float]] = {}
    used: dict[tuple[int, int], Counter[int]] = {}
    transform, words = book.transform.tolist(), book.codewords.tolist()

    def through_metric(whole: list[float]) -> list[float]:
        cut = [whole[g * book.width : (g + 1) * book.width] for g in range(book.groups)]
        return [
            math.fsum(a * b for a, b in zip(row, p, strict=True))
            for m, p in zip(transform, cut, strict=True)
            for row in m
        ]

    held = range(15, len(x), 16)
    for i in held:
        row = x[i].tolist()
        code = [c & 0xFF for c in book.encode(x[i : i + 1], beam)[0].tolist()]
        left = list(row)
        energy += squared(row)
        metric_energy += squared(through_metric(row))
        for r in range(book.stages):
            for g in range(book.groups):
                chosen = code[g * book.stages + r]
                used.setdefault((g, r), Counter())[chosen] += 1
                for d in range(book.width):
                    left[g * book.width + d] -= words[g][r][chosen][d]
            stage_error[r] += squared(left)
            metric_error[r] += squared(through_metric(left))
        for h in range(HEADS):
            part = slice(h * len(row) // HEADS, (h + 1) * len(row) // HEADS)
            heads[h][0] += squared(left[part])
            heads[h][1] += squared(row[part])
        position = i % LENGTH
        start = 0 if position < 16 else 2 ** int(math.log2(position))
        bucket = buckets.setdefault(start, [0, 0.0, 0.0])
        bucket[0] += 1
        bucket[1] += squared(left)
        bucket[2] += squared(row)
    count = len(held)

    def over_groups(figure) -> list[list[float]]:  # type: ignore[no-untyped-def]
        return [[figure(used[g, r]) for g in range(book.groups)] for r in range(book.stages)]

    entropies = over_groups(lambda uses: -sum(n / count * math.log2(n / count) for n in uses.values()))
    return {
        "vectors": count,
        "beam": beam,
        "by_stage": [e / energy for e in stage_error],
        "metric_by_stage": [e / metric_energy for e in metric_error],
        "by_head": [e / whole for e, whole in heads],
        "by_position": [
            {"start": s, "stop": min(LENGTH, 2 * s or 16), "vectors": n, "error": e / whole}
            for s, (n, e, whole) in sorted(buckets.items())
        ],
        "used_by_stage": [sum(row) / len(row) for row in over_groups(lambda uses: len(uses) / 256)],
        "entropy_by_stage": [sum(row) / len(row) for row in entropies],
        "top_share_by_stage": [max(row) for row in over_groups(lambda uses: max(uses.values()) / count)],
    }


@pytest.mark.parametrize(("width", "beam"), [(WIDTH, 1), (2 * WIDTH, 3), (WIDTH // 2, 2)])
def test_profile_is_what_a_plain_loop_finds(width: int, beam: int) -> None:
    book = random_codebook(HEADS * WIDTH, width, 3, transform=True)
    x = vectors(3 * LENGTH)
    found = profile_codebook(book, x, LENGTH, HEADS, beam).to_dict()
    expected = by_hand(book, x, beam)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "by_position":
            assert [{**entry, "error": 0} for entry in found[name]] == [{**e, "error": 0} for e in value]
            assert [e["error"] for e in found[name]] == pytest.approx([e["error"] for e in value], rel=1e-5)
        else:
            assert found[name] == pytest.approx(value, rel=1e-5), name
    assert [e["start"] for e in found["by_position"]] == [0, 16, 32, 64]


def test_many_vectors_give_the_same_however_they_are_split() -> None:
    """Beyond one encoder chunk: the mean over halves of equal length, weighted by their energy."""
    book = random_codebook(16, 16, 2)
    x = vectors(32 * (ENCODE_CHUNK // 2 + 40), 16)
    whole = profile_codebook(book, x, 32, 1)
    assert whole.vectors > ENCODE_CHUNK
    parts = [profile_codebook(book, half, 32, 1) for half in x.chunk(2)]
    energy = [float((half[15::16].double() ** 2).sum()) for half in x.chunk(2)]
    mean = sum(p.by_stage[-1] * e for p, e in zip(parts, energy, strict=True)) / sum(energy)
    assert whole.by_stage[-1] == pytest.approx(mean, rel=1e-6)
    assert whole.by_stage[-1] < whole.by_stage[0]


def test_extremes() -> None:
    book = random_codebook(16, 16, 2)
    exact = book.decode(torch.tensor([[7, 7]], dtype=torch.int8)).repeat(64, 1)
    found = profile_codebook(Codebook(book.codewords, book.transform), exact, 32, 2, beam=16)
    assert found.by_stage[-1] < 1e-12
    assert found.entropy_by_stage == [0.0, 0.0]
    assert found.top_share_by_stage == [1.0, 1.0]
    assert found.used_by_stage == [1 / 256, 1 / 256]
    nothing = Codebook(torch.zeros(1, 1, 256, 16).half(), torch.eye(16)[None])
    assert profile_codebook(nothing, vectors(64, 16), 32, 2).by_head == [1.0, 1.0]
    assert profile_codebook(nothing, torch.zeros(64, 16), 32, 2).by_head == [0.0, 0.0]


def test_round_trip() -> None:
    profile = profile_codebook(random_codebook(16, 16, 2), vectors(96, 16), 32, 2)
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize(
    ("rows", "elements", "length", "message"),
    [(64, 24, 32, "vectors of 24 elements"), (70, 16, 32, "70 vectors"), (8, 16, 8, "8 vectors")],
)
def test_wrong_vectors_are_refused(rows: int, elements: int, length: int, message: str) -> None:
    with pytest.raises(GsrqError, match=message):
        profile_codebook(random_codebook(16, 16, 1), torch.zeros(rows, elements), length, 2)


def test_nan_is_refused() -> None:
    x = torch.zeros(64, 16)
    x[15, 3] = math.nan
    with pytest.raises(GsrqError, match="NaN or infinity"):
        profile_codebook(random_codebook(16, 16, 1), x, 32, 2)

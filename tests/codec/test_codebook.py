"""The codec against brute force and its invariances."""

from __future__ import annotations

import pytest
import torch
from attention_cases import random_codebook

from gsrq_export.codec import codebook
from gsrq_export.codec.codebook import Codebook
from gsrq_export.errors import GsrqError


def greedy_by_definition(book: Codebook, vector: torch.Tensor) -> list[int]:
    codes = []
    for g in range(book.groups):
        a = book.transform[g].double()
        rest = vector.reshape(book.groups, book.width)[g].double()
        for r in range(book.stages):
            errors = [float((a @ (rest - c.double())).norm()) for c in book.codewords[g, r]]
            codes.append(min(range(256), key=errors.__getitem__))
            rest = rest - book.codewords[g, r, codes[-1]].double()
    return codes


@pytest.mark.parametrize("transform", [False, True])
def test_greedy_codes_are_the_nearest_codewords(transform: bool) -> None:
    book = random_codebook(24, 8, 3, transform=transform)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(5))
    codes = book.encode(x)
    for row, vector in zip(codes, x, strict=True):
        assert (row.to(torch.int64) & 255).tolist() == greedy_by_definition(book, vector)
    expected = torch.zeros(9, 3, 8)
    for g in range(3):
        for r in range(3):
            expected[:, g] += book.codewords[g, r, codes[:, g * 3 + r].to(torch.int64) & 255].float()
    torch.testing.assert_close(book.decode(codes), expected.reshape(9, 24))


def test_full_beam_finds_the_best_of_all_paths() -> None:
    book = random_codebook(4, 4, 2)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(6))
    sums = (book.codewords[0, 0].double()[:, None] + book.codewords[0, 1].double()[None]).flatten(0, 1)
    best = torch.cdist(x.double(), sums).min(1).values
    found = (x.double() - book.decode(book.encode(x, beam=256)).double()).norm(dim=1)
    torch.testing.assert_close(found, best, atol=1e-6, rtol=1e-6)
    greedy = (x.double() - book.decode(book.encode(x)).double()).norm(dim=1)
    assert float(greedy.sum()) > float(best.sum())


@pytest.mark.parametrize("beam", [1, 4])
def test_codes_do_not_depend_on_the_batch_split(beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook, "ENCODE_CHUNK", 600)
    book = random_codebook(32, 16, 5)
    x = torch.randn(1501, 32, generator=torch.Generator().manual_seed(7))
    whole = book.encode(x, beam)
    for size in (500, 97):
        assert torch.equal(whole, torch.cat([book.encode(part, beam) for part in x.split(size)]))


def test_ties_go_to_the_lower_code() -> None:
    words = torch.zeros(1, 2, 256, 4)
    words[0, 0, 7] = words[0, 0, 9] = 1.0
    book = Codebook(words.half(), torch.eye(4)[None])
    for beam in (1, 3):
        assert book.encode(torch.ones(1, 4), beam).tolist() == [[7, 0]]


def test_empty_input() -> None:
    assert random_codebook(8, 4, 3).encode(torch.zeros(0, 8)).shape == (0, 6)


@pytest.mark.parametrize(
    ("words", "transform", "message"),
    [
        (
            torch.full((1, 1, 256, 4), float("nan")).half(),
            torch.eye(4)[None],
            "codewords: 1024 of 1024 entries are NaN",
        ),
        (torch.zeros(1, 1, 256, 4).half(), torch.full((1, 4, 4), float("inf")), "transform: 16 of 16"),
        (torch.zeros(1, 1, 255, 4).half(), torch.eye(4)[None], "codewords must be float16"),
        (torch.zeros(1, 1, 256, 4), torch.eye(4)[None], "codewords must be float16"),
        (torch.zeros(1, 1, 256, 4).half(), torch.eye(3)[None], "transform must be float32"),
    ],
)
def test_bad_codebooks_are_refused(words: torch.Tensor, transform: torch.Tensor, message: str) -> None:
    with pytest.raises(GsrqError, match=message):
        Codebook(words, transform)

"""Codewords as int8 times a power of two a stage."""

from __future__ import annotations

import pytest
import torch

from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.int8 import KEY_SPREAD, LARGEST, snap, snap_layers, stage_integers
from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.errors import GsrqError


def book_of(scales: list[float], groups: int = 2, width: int = 5) -> Codebook:
    """Gaussian codewords; stage r has elements of size scales[r]."""
    words = torch.randn(groups, len(scales), 256, width, generator=torch.Generator().manual_seed(1))
    words *= torch.tensor(scales)[None, :, None, None]
    return Codebook(words.half(), torch.eye(width).repeat(groups, 1, 1))


@pytest.mark.parametrize("spread", [None, KEY_SPREAD])
def test_snapped_codewords_are_the_nearest_int8_times_the_least_power_of_two(spread: int | None) -> None:
    book = book_of([3.0, 1.0, 0.3, 0.02, 1e-3])
    integers, exponents = stage_integers(snap(book, spread), spread)
    assert int(integers.int().abs().max()) <= LARGEST
    free = []
    for r, exponent in enumerate(exponents.tolist()):
        unit, words = 2.0**exponent, book.codewords[:, r].double()
        assert torch.equal(snap(book, spread).codewords[:, r].double(), integers[:, r].double() * unit)
        assert float((integers[:, r].double() * unit - words).abs().max()) <= unit / 2
        least = next(e for e in range(-24, 10) if float(words.abs().max()) <= LARGEST * 2.0**e)
        free.append(least)
        assert exponent == (least if spread is None else max(least, max(exponents.tolist()) - spread))
    assert max(free) - min(free) > KEY_SPREAD  # else raising was not tested


def test_one_exponent_serves_all_groups() -> None:
    book = book_of([1.0, 0.5])
    words = book.codewords.clone()
    words[1] *= 16
    integers, _ = stage_integers(snap(Codebook(words, book.transform)))
    small, large = integers.int().abs().amax((1, 2, 3)).tolist()
    assert large > 63
    assert small < 16


@pytest.mark.parametrize(("value", "stored"), [(65504.0, 65024.0), (2.0**-24, 2.0**-24), (0.0, 0.0)])
def test_the_ends_of_float16(value: float, stored: float) -> None:
    book = Codebook(torch.full((1, 1, 256, 2), value).half(), torch.eye(2)[None])
    assert snap(book).codewords.unique().tolist() == [stored]


def test_snapping_again_and_fewer_stages_change_nothing() -> None:
    for spread in (None, KEY_SPREAD):
        once = snap(book_of([5.0, 0.7, 0.01, 0.002]), spread)
        assert torch.equal(snap(once, spread).codewords, once.codewords)
        few = once.first_stages(2)
        assert torch.equal(snap(few, spread).codewords, few.codewords)


def test_other_codebooks_are_refused_by_stage() -> None:
    book = snap(book_of([1.0, 1.0, 1.0]))
    words = book.codewords.clone()
    words[0, 1, 7, 3] += 2.0**-9
    with pytest.raises(GsrqError, match="stages 1 are"):
        stage_integers(Codebook(words, book.transform))
    far = snap(book_of([1.0, 1e-3]))
    stage_integers(far)
    with pytest.raises(GsrqError, match="stages 1 are"):
        stage_integers(far, KEY_SPREAD)


def test_keys_alone_keep_the_spread() -> None:
    (pair,) = snap_layers([LayerCodebooks(book_of([1.0, 1e-3]), book_of([1.0, 1e-3]))])
    keys, values = stage_integers(pair.keys, KEY_SPREAD)[1], stage_integers(pair.values)[1]
    assert keys.tolist()[0] - keys.tolist()[1] == KEY_SPREAD
    assert values.tolist()[0] - values.tolist()[1] > KEY_SPREAD


def test_unseen_vectors_are_coded_as_well_up_to_the_rounding() -> None:
    generator = torch.Generator().manual_seed(2)
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(8000, 32, generator=generator) * torch.logspace(0, -1, 32)
    book, _ = train_codebook(vectors[2000:], None, 32, 8, Training(iterations=4))
    x = vectors[:2000]
    snapped = snap(book, KEY_SPREAD)

    def error(of: Codebook) -> float:
        return float(((x - of.decode(of.encode(x))) ** 2).sum() / (x**2).sum())

    units = torch.exp2(stage_integers(snapped, KEY_SPREAD)[1].double())
    rounding = float((units**2).sum() / 12 * x.numel() / (x**2).sum())  # were no later stage to code it
    assert not torch.equal(snapped.codewords, book.codewords)
    assert abs(error(snapped) - error(book)) < rounding < 0.02 * error(book)

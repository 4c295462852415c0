"""Least-squares refits against a dense solve."""

from __future__ import annotations

import torch

from gsrq_export.codec.refit import PSEUDO_COUNT, encode_rows, refit
from gsrq_export.codec.residual import Training, train_codebook


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_refit_is_the_regularised_least_squares_solution() -> None:
    rows, width, stages = 900, 5, 2
    x, words = gaussian(rows, width, seed=1), 0.5 * gaussian(stages, 256, width, seed=2)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(3)) + 0.1
    codes = torch.randint(0, 9, (rows, stages), generator=torch.Generator().manual_seed(4))  # 9 words: well determined
    design = torch.zeros(rows, stages * 256, dtype=torch.float64)
    for r in range(stages):
        design[torch.arange(rows), 256 * r + codes[:, r]] = 1
    start = words.double().flatten(0, 1)
    stay = PSEUDO_COUNT * weights.double().mean()
    normal = design.T @ (design * weights[:, None]) + stay * torch.eye(stages * 256)
    right = design.T @ ((x.double() - design @ start) * weights[:, None])
    expected = (start + torch.linalg.solve(normal, right)).reshape(words.shape).float()
    found = refit(x, weights, codes, words)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert torch.equal(found[:, 9:], words[:, 9:])  # nobody spoke for them


def test_refits_lower_the_error_of_unseen_rows() -> None:
    mix = gaussian(16, 16, seed=5)
    x = gaussian(6000, 16, seed=6) @ mix
    plain, before = train_codebook(x, None, 16, 4, Training(iterations=4))
    fitted, after = train_codebook(x, None, 16, 4, Training(iterations=4, beam=4, refits=2))
    fresh = gaussian(2000, 16, seed=7) @ mix

    def error(book: object, beam: int) -> float:
        rest = fresh - book.decode(book.encode(fresh, beam))  # type: ignore[attr-defined]
        return float((rest**2).sum() / (fresh**2).sum())

    assert after.held_out[-1] < 0.97 * before.held_out[-1]
    assert error(fitted, 4) < error(plain, 4) < error(plain, 1)
    assert abs(after.held_out[-1] - error(fitted, 4)) < 0.1 * error(fitted, 4)


def test_training_codes_are_those_of_the_reference() -> None:
    x = gaussian(3000, 12, seed=8)  # fewer would leave nothing to the last stages, where all codes tie
    book, _ = train_codebook(x, None, 12, 5, Training(iterations=2))
    for beam in (1, 3, 8):
        exact = book.encode(x, beam).long() & 255
        assert float((encode_rows(x, book.codewords[0].float(), beam) == exact).float().mean()) > 0.999

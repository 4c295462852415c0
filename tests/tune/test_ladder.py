"""A ladder's lower rungs are what training fewer stages gives."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.tune.ladder import interpolated, rungs


def test_the_first_stages_of_a_codebook_are_a_codebook() -> None:
    vectors = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))
    training = Training(iterations=2, seed=3)
    long, _ = train_codebook(vectors, None, 16, 5, training)
    short, _ = train_codebook(vectors, None, 16, 2, training)
    cut = long.first_stages(2)
    assert torch.equal(cut.codewords, short.codewords)
    assert torch.equal(cut.transform, short.transform)
    assert torch.equal(cut.encode(vectors), long.encode(vectors).reshape(600, 2, 5)[:, :, :2].reshape(600, 4))


def test_rungs_span_the_range() -> None:
    assert rungs(1, 5) == [1]
    assert rungs(3, 5) == [1, 2, 3]
    assert rungs(48, 5) == [1, 3, 7, 18, 48]


def test_between_rungs_the_loss_is_between_and_never_rises() -> None:
    found = interpolated({1: 1.0, 4: 0.25, 8: 0.3, 16: 0.0625})
    assert len(found) == 16
    assert found[0] == 1.0
    assert found[1] == pytest.approx(0.5)  # a power law through (1, 1) and (4, 1/4)
    assert found[3] == found[7] == 0.25
    assert found[15] == 0.0625
    assert all(after <= before for before, after in pairwise(found))

"""What is measured is what the deployed cache gives, at the tokens that are meant."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from demo import demo, demo_text
from torch.nn import functional

from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import coded
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.int8 import snap_layers
from gsrq_export.model.introspect import inspect_model
from gsrq_export.traffic.recall_passages import plant
from gsrq_export.tune.measure import Meter, answer_tokens

RULE = CacheRule(2, 24, 16)


def traffic(rows: int, length: int) -> np.ndarray:
    """Demo text; the even rows have recall passages."""
    _, tokenizer = demo()
    ids = np.array(tokenizer.encode(demo_text(), add_special_tokens=False)[: rows * length]).reshape(rows, length)
    for row in range(0, rows, 2):
        ids[row] = plant(np.random.default_rng(row), ids[row], tokenizer, 2)
    return ids


def test_answers_are_found_to_the_token() -> None:
    _, tokenizer = demo()
    ids = traffic(4, 256)
    found = answer_tokens(ids, tokenizer)
    assert found[1::2].sum() == 0
    for row in (0, 2):
        answers = re.findall(r"Answer:((?: \d){5})", tokenizer.decode(ids[row]))
        predicted = ids[row][1:][found[row, :-1].numpy()]
        assert tokenizer.decode(predicted).replace(" ", "") == "".join(answers).replace(" ", "")
        assert len(answers) >= 1


@pytest.mark.parametrize(("int8", "rotated"), [(False, False), (True, False), (False, True)])
def test_the_divergence_is_that_of_the_coded_cache(int8: bool, rotated: bool) -> None:
    model, tokenizer = demo()
    spec = inspect_model(model, 256)
    ids = traffic(2, 128)
    rows, answers = torch.from_numpy(ids), answer_tokens(ids, tokenizer)
    generator = torch.Generator().manual_seed(0)
    books = [
        Codebook(0.3 * torch.randn(2, 2, 256, 64, generator=generator).half(), torch.eye(64).repeat(2, 1, 1))
        for _ in range(12)
    ]
    for book in books:
        book.codewords[:, :, 255] = 60  # never chosen, and makes the steps of int8 so coarse that they tell
    if rotated:
        centers = [torch.randn(128, generator=generator) if i % 2 == 0 else None for i in range(12)]
        books = [replace(book, center=center) for book, center in zip(books, centers, strict=True)]
    meter = Meter(model, spec, rows, answers, beam=2, int8=int8)
    found = meter.measure({(i // 2, ("key", "value")[i % 2]): book for i, book in enumerate(books)}, RULE)
    layers = [LayerCodebooks(*books[i : i + 2]) for i in range(0, 12, 2)]
    layers = snap_layers(layers) if int8 else layers
    with torch.no_grad():
        exact = model(rows, use_cache=False).logits.log_softmax(-1)
        with coded(model, layers, RULE, beam=2, spec=spec, exact_dtype=torch.float32):
            other = model(rows, use_cache=True).logits.log_softmax(-1)
    kl = functional.kl_div(other, exact, log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=0.01)
    assert found.answer_kl == pytest.approx(float(kl[answers].mean()), rel=0.02)
    assert found.loss == pytest.approx((found.kl + (found.answer_kl or 0)) / 2)
    assert found.kl > 0.01
    one = meter.measure({(3, "value"): books[7]}, RULE)
    assert 0 < one.kl < found.kl
    assert abs(meter.measure({}, RULE).kl) < 1e-6
    assert Meter(model, spec, rows[1:], answers[1:]).measure({}, RULE).answer_kl is None

"""Fine-tuning: its coded model is the one that is deployed, and it ends nearer to the exact one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo import demo, demo_text
from torch.nn import functional

from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import coded
from gsrq_export.capture import KINDS, Captured, CaptureSettings, capture, training_vectors
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.finetune import Finetuning, finetune
from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.errors import GsrqError
from gsrq_export.model.introspect import ModelSpec, inspect_model

RULE = CacheRule(2, 24, 16)
LENGTH = 160


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, torch.Tensor, list[LayerCodebooks]]:
    """The demo model's spec, ten sequences, and quickly trained codebooks of 0.125 bits, all words too short."""
    model, tokenizer = demo()
    ids = torch.tensor(tokenizer.encode(demo_text(), add_special_tokens=False)[: 10 * LENGTH]).reshape(10, LENGTH)
    spec = inspect_model(model, 256)
    folder = tmp_path_factory.mktemp("captured")
    capture(model, spec, ids.numpy(), CaptureSettings(128, 128, gradients=False), Path(folder))
    books = []
    for layer in spec.layers:
        pair = [
            train_codebook(Captured(folder).vectors(layer, kind), None, 128, 2, Training(iterations=2))[0]
            for kind in KINDS
        ]
        books.append(LayerCodebooks(*(Codebook(book.codewords * 0.7, book.transform) for book in pair)))
    return spec, ids, books


def divergence(spec: ModelSpec, books: list[LayerCodebooks], ids: torch.Tensor, beam: int = 1) -> float:
    """Mean KL(exact || coded) through the cache that evaluation uses."""
    model, _ = demo()
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits.log_softmax(-1)
        with coded(model, books, RULE, beam=beam, spec=spec, exact_dtype=torch.float32):
            found = model(ids, use_cache=True).logits.log_softmax(-1)
    return float(functional.kl_div(found.flatten(0, 1), exact.flatten(0, 1), log_target=True, reduction="batchmean"))


def test_steps_bring_the_deployed_model_nearer(
    material: tuple[ModelSpec, torch.Tensor, list[LayerCodebooks]],
) -> None:
    spec, ids, books = material
    model, _ = demo()
    settings = Finetuning(steps=10, batch=2, learning_rate=0.03, beam=2)
    tuned, log = finetune(model, spec, ids, books, RULE, settings)
    # What was measured before any step is what the deployed cache gives on the held-out (here the last) sequence.
    before, after = divergence(spec, books, ids[9:], beam=2), divergence(spec, tuned, ids[9:], beam=2)
    assert abs(log.held_out_kl[0] - before) < 0.03 * before
    assert abs(min(log.held_out_kl) - after) < 0.03 * after
    assert after < 0.9 * before
    assert log.steps == [0, 2, 4, 6, 8, 10]
    again, _ = finetune(model, spec, ids, books, RULE, settings)
    for one, other in zip(tuned, again, strict=True):
        assert torch.equal(one.keys.codewords, other.keys.codewords)
        assert torch.equal(one.values.codewords, other.values.codewords)
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())


def test_rotated_keys_are_tuned_as_they_are_deployed(tmp_path: Path) -> None:
    model, tokenizer = demo()
    ids = torch.tensor(tokenizer.encode(demo_text(), add_special_tokens=False)[: 4 * LENGTH]).reshape(4, LENGTH)
    spec = inspect_model(model, 256)
    capture(model, spec, ids.numpy(), CaptureSettings(128, 128, gradients=False), tmp_path)
    books = []
    for layer in spec.layers:
        pair = []
        for kind in KINDS:
            vectors, center = training_vectors(Captured(tmp_path), spec, layer, kind, rotated_keys=True)
            book, _ = train_codebook(vectors, None, 128, 2, Training(iterations=2))
            pair.append(replace(book, codewords=book.codewords * 0.7, center=center))
        books.append(LayerCodebooks(*pair))
    tuned, log = finetune(model, spec, ids, books, RULE, Finetuning(steps=4, batch=2, learning_rate=0.03, beam=2))
    before, after = (divergence(spec, of, ids[3:], beam=2) for of in (books, tuned))
    assert abs(log.held_out_kl[0] - before) < 0.03 * before
    assert abs(min(log.held_out_kl) - after) < 0.03 * after
    assert after < before
    assert all(torch.equal(a.keys.center, b.keys.center) for a, b in zip(tuned, books, strict=True))


def test_a_rate_that_destroys_keeps_what_was_given(
    material: tuple[ModelSpec, torch.Tensor, list[LayerCodebooks]],
) -> None:
    spec, ids, books = material
    tuned, log = finetune(demo()[0], spec, ids[:3], books, RULE, Finetuning(steps=5, batch=1, learning_rate=100.0))
    assert min(log.held_out_kl) == log.held_out_kl[0]
    for one, other in zip(tuned, books, strict=True):
        assert torch.equal(one.keys.codewords, other.keys.codewords)


def test_refuses_what_it_cannot_learn_from(material: tuple[ModelSpec, torch.Tensor, list[LayerCodebooks]]) -> None:
    spec, ids, books = material
    for short in (ids[:1], ids[:, :40]):
        with pytest.raises(GsrqError, match="of which"):
            finetune(demo()[0], spec, short, books, RULE, Finetuning(steps=1))

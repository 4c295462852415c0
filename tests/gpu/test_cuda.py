"""torch on CUDA against torch on the CPU: the codec, the cache and capture."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, random_codebook
from families import tiny_model

from gsrq_export import CacheRule, LayerCodebooks, coded
from gsrq_export.cache.reference import LayerCache, gsrq_attention
from gsrq_export.capture import CaptureSettings, capture_shard
from gsrq_export.codec.residual import Training, train_codebook
from gsrq_export.model.introspect import inspect_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("transform", [False, True])
def test_codes_are_identical(beam: int, transform: bool) -> None:
    book = random_codebook(96, 32, 7, transform=transform)
    x = torch.randn(5003, 96, generator=torch.Generator().manual_seed(1))
    codes = book.to("cuda").encode(x.cuda(), beam)
    assert torch.equal(codes.cpu(), book.encode(x, beam))
    torch.testing.assert_close(book.to("cuda").decode(codes).cpu(), book.decode(codes.cpu()))


@pytest.mark.parametrize("method", ["gskm", "kmeans", "kmeans-spherical"])
def test_training_repeats_to_the_bit_and_codes_as_well_as_on_the_cpu(method: str) -> None:
    x = torch.randn(9001, 48, generator=torch.Generator().manual_seed(2))
    training = Training(method, 5)  # type: ignore[arg-type]
    first, log = train_codebook(x.cuda(), None, 24, 4, training)
    again, _ = train_codebook(x.cuda(), None, 24, 4, training)
    assert torch.equal(first.codewords, again.codewords)
    _, on_cpu = train_codebook(x, None, 24, 4, training)
    assert log.held_out[-1] == pytest.approx(on_cpu.held_out[-1], rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator(case: Case) -> None:
    data = case.data()
    output, after = case.run(data)
    cache = LayerCache(**{name: tensor.cuda() for name, tensor in vars(case.empty()).items()})
    tensors = (data.query, data.key, data.value, data.cos, data.sin, torch.zeros(case.batch, dtype=torch.int64))
    got, cache = gsrq_attention(
        *(t.cuda() for t in (*tensors, data.lengths)), cache, case.keys.to("cuda"), case.values.to("cuda"), case.config
    )
    torch.testing.assert_close(got.cpu(), output, atol=1e-4, rtol=1e-4)
    for name, tensor in vars(after).items():
        assert torch.equal(tensor, getattr(cache, name).cpu()), name


@torch.no_grad()
def test_generation_and_capture() -> None:
    model = tiny_model("Llama").requires_grad_(False)
    spec = inspect_model(model, 128)
    books = [LayerCodebooks(random_codebook(64, 64, 3), random_codebook(64, 32, 2)) for _ in spec.layers]
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    settings = CaptureSettings(64, 32)
    with coded(model, books, CacheRule(2, 8, 4), spec=spec, exact_dtype=torch.float32):
        expected = model(ids).logits
    with torch.enable_grad():
        shard = capture_shard(model, spec, ids, settings)
    model.cuda()
    with coded(model, books, CacheRule(2, 8, 4), exact_dtype=torch.float32):
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=2e-3, rtol=2e-3)
        assert model.generate(ids.cuda(), max_new_tokens=9, pad_token_id=0).shape[0] == 2
    with torch.enable_grad():
        on_gpu = capture_shard(model, spec, ids.cuda(), settings)
    for name, tensor in shard.items():
        torch.testing.assert_close(on_gpu[name].float(), tensor.float(), atol=2e-2, rtol=2e-2, msg=name)

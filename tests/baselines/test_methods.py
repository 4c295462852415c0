"""Each baseline against its definition, on data small enough to work out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import random_codebook

from gsrq_export import GsrqError
from gsrq_export.baselines.affine import affine
from gsrq_export.baselines.base import Method, Sample
from gsrq_export.baselines.calibrate import families, gradient_width
from gsrq_export.baselines.cq import CoupledQuantization, fisher_weights
from gsrq_export.baselines.fp8 import Fp8
from gsrq_export.baselines.int4 import TokenHeadInt
from gsrq_export.baselines.kivi import Kivi, KiviKeys, KiviValues
from gsrq_export.baselines.kmeans import assign, grouped_kmeans
from gsrq_export.baselines.methods import chosen, registry
from gsrq_export.baselines.residual import Residual, ResidualCodec
from gsrq_export.baselines.turboquant import TurboQuant, gaussian_levels, rotation
from gsrq_export.baselines.vqllm import EmaCodebook, Vqllm, from_groups, scales, to_groups
from gsrq_export.codec.residual import Training, gradient_weights, train_codebook


def sample(kind: str = "key", rows: int = 700, heads: int = 2, dim: int = 16, gradients: int = 0) -> Sample:
    """Correlated, of uneven scale, as keys are."""
    generator = torch.Generator().manual_seed(heads * dim)
    mix = torch.randn(heads * dim, heads * dim, generator=generator) / (heads * dim) ** 0.5
    x = torch.randn(rows, heads * dim, generator=generator) @ mix * torch.logspace(-1, 1, heads * dim)
    norms = torch.rand(rows, gradients, generator=generator) if gradients else None
    return Sample(kind, x.reshape(rows, heads, dim), norms)


def error(method: Method, data: Sample) -> float:
    """Relative squared error."""
    seen = method.fit(data).reconstruct(data.vectors)
    return float(((seen - data.vectors) ** 2).sum() / (data.vectors**2).sum())


def test_affine_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.5, 3.0], [-4.0, -4.0, -4.0, -4.0], [-1.0, 5.0, 1.6, 2.4]])
    assert affine(x, 2, 1).tolist() == [[0, 1, 2, 3], [-4, -4, -4, -4], [-1, 5, 1, 3]]  # half of a step goes to even
    assert affine(x, 1, 1)[2].tolist() == [-1, 5, -1, 5]
    coarse = torch.tensor([0.1, 0.18, 0.35, 0.7])
    low, step = coarse[0].half().float(), ((coarse[3] - coarse[0]) / 3).half().float()
    torch.testing.assert_close(affine(coarse, 2, 0), low + step * torch.tensor([0, 0, 1, 3]), rtol=0, atol=0)


def test_kivi_groups_keys_over_tokens_and_values_over_channels() -> None:
    # One channel of one head, tokens 0..3 and 4..7 in groups of their own.
    tokens = torch.tensor([0.0, 3.0, 1.0, 2.0, 10.0, 70.0, 49.0, 31.0])
    keys = KiviKeys(2, 4).reconstruct(tokens[:, None, None])
    assert keys.flatten().tolist() == [0, 3, 1, 2, 10, 70, 50, 30]
    values = KiviValues(2, 4).reconstruct(tokens[None, None])
    assert torch.equal(values.flatten(), keys.flatten())
    assert KiviKeys(1, 4).reconstruct(tokens[:, None, None]).flatten().tolist() == [0, 3, 0, 3, 10, 70, 70, 10]
    data = sample()
    moved = data.vectors[:64].clone()
    moved[33, 1, 5] += 100
    before, after = (KiviKeys(2, 32).reconstruct(x) for x in (data.vectors[:64], moved))
    changed = (before != after).nonzero()
    assert set(changed[:, 0].tolist()) <= set(range(32, 64)), "another group must not notice"
    assert changed[:, 1:].unique(dim=0).tolist() == [[1, 5]], "nor another channel"


def test_int4_is_per_token_and_head() -> None:
    x = torch.stack([torch.arange(16.0), 2 * torch.arange(16.0) - 7])[None]
    codec = TokenHeadInt(4).fit(sample())
    assert torch.equal(codec.reconstruct(x), x), "16 levels hold 16 equally spaced numbers"
    x[0, 0, 3] += 0.4
    assert codec.reconstruct(x)[0, 0, 3] == 3


def test_fp8_is_a_scaled_cast() -> None:
    data = sample()
    codec = Fp8().fit(data)
    scale = data.vectors.abs().max() / 448
    expected = (data.vectors / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(codec.reconstruct(data.vectors), expected)
    assert float(((expected - data.vectors).abs() / data.vectors.abs().clamp(min=scale * 2**-6)).max()) <= 2**-4 + 1e-6
    over = codec.reconstruct(torch.full((1, 2, 16), 1e6))
    torch.testing.assert_close(over, (scale * 448).expand_as(over))
    assert (codec.bits_per_element(2, 16), codec.shared_bytes) == (8, 4)
    zero = Fp8().fit(Sample("key", torch.zeros(4, 2, 16)))
    assert torch.equal(zero.reconstruct(torch.zeros(4, 2, 16)), torch.zeros(4, 2, 16))


# Max, "Quantizing for minimum distortion", 1960, table I: positive levels and mean squared error.
MAX_1960 = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("bits", MAX_1960)
def test_turboquant(bits: int) -> None:
    positive, distortion = MAX_1960[bits]
    levels = torch.tensor(gaussian_levels(bits))
    torch.testing.assert_close(levels[len(levels) // 2 :], torch.tensor(positive), atol=6e-4, rtol=0)
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-6, rtol=0)
    # Any vector, however spiky, costs about what a Gaussian does: that is what the rotation is for.
    dim = 128
    spiky = torch.zeros(4000, 1, dim)
    spiky[torch.arange(4000), 0, torch.arange(4000) % dim] = torch.logspace(-2, 2, 4000)
    dense = torch.randn(4000, 1, dim, generator=torch.Generator().manual_seed(0)) * 3
    method = TurboQuant(bits)
    for x in (spiky, dense):
        seen = method.fit(Sample("key", x)).reconstruct(x)
        relative = ((seen - x) ** 2).sum(-1) / (x**2).sum(-1)
        assert float(relative.mean()) == pytest.approx(distortion, rel=0.06)
    turn = rotation(dim, 0, "cpu")
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim), atol=1e-5, rtol=0)
    assert method.fit(Sample("key", dense)).shared_tensors()[0] is turn
    assert method.fit(Sample("key", dense)).reconstruct(torch.zeros(1, 1, dim)).abs().max() == 0


def test_cq_is_weighted_k_means_of_each_channel_group() -> None:
    data = sample(gradients=8)  # norms of 4 channels each
    codec = CoupledQuantization(8, iterations=20).fit(data)
    words = codec.shared_tensors()[0]
    assert words.shape == (4, 1, 256, 8)
    flat = data.vectors.reshape(700, 4, 8)
    seen = codec.reconstruct(data.vectors).reshape(700, 4, 8)
    for g in range(4):
        distance = torch.cdist(flat[:, g].double(), words[g, 0].double())
        torch.testing.assert_close(seen[:, g].double(), words[g, 0].double()[distance.argmin(1)])
    energy = (data.gradients.reshape(700, 4, 2) ** 2).sum(2)
    torch.testing.assert_close(fisher_weights(data.gradient_norms(8)), energy / energy.mean(0))
    assert torch.equal(fisher_weights(torch.zeros(5, 2)), torch.ones(5, 2))
    # More weight, less error: rows with large gradients end nearer to their centroid than without weights.
    heavy = torch.where(torch.arange(700)[:, None] % 7 == 0, 30.0, 0.1).expand(700, 4).contiguous()
    weighted = CoupledQuantization(8, iterations=20).fit(Sample("key", data.vectors, heavy))
    plain = CoupledQuantization(8, iterations=20).fit(Sample("key", data.vectors))
    fewer = CoupledQuantization(8, 3, rows=350).fit(data).shared_tensors()[0]
    half = Sample("key", data.vectors[::2], data.gradients[::2])
    assert torch.equal(fewer, CoupledQuantization(8, 3).fit(half).shared_tensors()[0])
    rows = data.vectors[::7]
    assert ((weighted.reconstruct(rows) - rows) ** 2).sum() < 0.5 * ((plain.reconstruct(rows) - rows) ** 2).sum()


def test_grouped_k_means() -> None:
    generator = torch.Generator().manual_seed(2)
    centers = torch.randn(3, 256, 2, generator=generator) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    member = torch.randint(256, (3, 4000), generator=generator)
    x = centers.gather(1, member[..., None].expand(-1, -1, 2)) + 1e-3 * torch.randn(3, 4000, 2, generator=generator)
    weights = torch.rand(3, 4000, generator=generator)

    def cost(x: torch.Tensor, weights: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return (weights * torch.cdist(x, words).min(2).values ** 2).sum(1) / (weights * (x**2).sum(2)).sum(1)

    words = grouped_kmeans(x, weights, 15, torch.Generator().manual_seed(0))
    index, gain = assign(x, words)
    distance = torch.cdist(x.double(), words.double()) ** 2
    excess = distance.gather(2, index[..., None])[..., 0] - distance.amin(2)
    assert bool((excess <= 1e-5 * (x**2).sum(2)).all()), "the nearest, but for float32"
    torch.testing.assert_close(((x**2).sum(2) - gain).double(), distance.amin(2), atol=2e-2, rtol=1e-3)
    once = grouped_kmeans(x, weights, 1, torch.Generator().manual_seed(0))
    assert bool((cost(x, weights, words) < 0.8 * cost(x, weights, once)).all())
    assert float(cost(x, weights, words).max()) < 2e-3
    again = grouped_kmeans(x, weights, 15, torch.Generator().manual_seed(0))
    assert torch.equal(words, again)
    # One step by hand: each centroid is the weighted mean of the rows nearest to a seed.
    seeds = x[:, torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:256]]
    near, _ = assign(x, seeds)
    mine = near[0] == 17
    expected = (weights[0, mine, None] * x[0, mine]).sum(0) / weights[0, mine].sum()
    torch.testing.assert_close(once[0, 17], expected)
    # Clusters that nobody is nearest to are used again.
    twice = torch.cat([x[:, :200].repeat(1, 2, 1), x[:, 1000:1400]], 1)
    found = grouped_kmeans(twice, torch.ones(3, 800), 10, torch.Generator().manual_seed(0))
    assert all(len(assign(twice, found)[0][g].unique()) > 225 for g in range(3))


def test_vqllm_groups_and_scale() -> None:
    x = torch.arange(16.0).reshape(1, 2, 8)
    assert to_groups(x, 4, "value")[0, 1].tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert to_groups(x, 4, "key")[0, 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for kind in ("key", "value"):
        assert torch.equal(from_groups(to_groups(x, 4, kind), kind), x)
    assert scales(x)[0, 0, 0] == x[0, 0].std().half().float()
    data = sample("value")
    codec = Vqllm(64, 2, 8, steps=5).fit(data)
    louder = data.vectors * 64  # a power of two leaves float16 rounding alone
    torch.testing.assert_close(codec.reconstruct(louder), 64 * codec.reconstruct(data.vectors))
    assert codec.shared_tensors()[0].shape == (2, 64, 8)


def test_vqllm_ema() -> None:
    stage = EmaCodebook(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]))
    x, index = torch.tensor([[2.0, 2.0], [4.0, 0.0], [0.0, 6.0]]), torch.tensor([0, 0, 1])
    stage.update(x, index)
    # Averages by hand: sums .99 * word + .01 * members, counts .99 + .01 * number.
    expected = torch.tensor([[0.99 + 0.06, 0.02], [0.0, 1.98 + 0.06], [4.95, 4.95]])
    expected /= torch.tensor([[1.01], [1.0], [0.99]])
    torch.testing.assert_close(stage.words, expected, atol=1e-4, rtol=1e-4)
    for _ in range(1500):
        stage.update(x, index)
    torch.testing.assert_close(stage.words[:2], torch.tensor([[3.0, 1.0], [0.0, 6.0]]), atol=1e-3, rtol=0)
    assert torch.isfinite(stage.words).all(), "an entry that nobody uses stays finite"


def test_vqllm_learns() -> None:
    data = sample("value")
    errors = [error(Vqllm(64, stages, 8, steps=20), data) for stages in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.15
    untrained = Vqllm(64, 1, 8, steps=1).fit(data).shared_tensors()[0]
    assert not torch.equal(untrained, Vqllm(64, 1, 8, steps=40).fit(data).shared_tensors()[0])


@pytest.mark.parametrize("clustering", ["gskm", "kmeans"])
def test_residual_is_the_projects_codec(clustering: str) -> None:
    data = sample(gradients=4)
    codec = Residual(clustering, 16, 3, iterations=4).fit(data)
    weights = gradient_weights((data.gradients.reshape(700, 2, 2) ** 2).sum(2).sqrt())
    book, _ = train_codebook(data.vectors.flatten(1), weights, 16, 3, Training(clustering, 4, 0))
    assert torch.equal(codec.shared_tensors()[0], book.codewords)
    expected = book.decode(book.encode(data.vectors.flatten(1))).reshape(data.vectors.shape)
    assert torch.equal(codec.reconstruct(data.vectors), expected)


# Bits an element of two heads of 64, and bytes that all tokens share, counted by hand.
COUNTED = [
    (Fp8(), 8.0, 4, 4),
    (TokenHeadInt(4), 4 + 32 / 64, 0, 0),
    (Kivi(2, 32), 3.0, 0, 0),
    (Kivi(1, 64), 1.5, 0, 0),
    (TurboQuant(2), 2 + 16 / 64, 4 * 64 * 64, 4 * 64 * 64),
    (CoupledQuantization(8, 1), 1.0, 2 * 16 * 256 * 8, 2 * 16 * 256 * 8),
    (CoupledQuantization(4, 1), 2.0, 2 * 32 * 256 * 4, 2 * 32 * 256 * 4),
    (Vqllm(256, 4, 32, steps=1), 1 + 16 / 64, 2 * 4 * 256 * 32, 2 * 4 * 256 * 32),
    (Vqllm(512, 2, 32, steps=1), 18 / 32 + 16 / 64, 2 * 2 * 512 * 32, 2 * 2 * 512 * 32),
    (Residual("gskm", 128, 2, 1), 0.125, 2 * 2 * 256 * 128, 2 * 2 * 256 * 128),
]


@pytest.mark.parametrize(("method", "bits", "key_bytes", "value_bytes"), COUNTED, ids=lambda x: getattr(x, "label", ""))
def test_bits_and_determinism(method: Method, bits: float, key_bytes: int, value_bytes: int) -> None:
    for kind, shared in (("key", key_bytes), ("value", value_bytes)):
        data = sample(kind, dim=64)
        first, second = method.fit(data), method.fit(data)
        assert first.bits_per_element(2, 64) == pytest.approx(bits)
        assert first.shared_bytes == shared
        seen = first.reconstruct(data.vectors[:640])
        assert seen.shape == (640, 2, 64)
        assert torch.equal(seen, second.reconstruct(data.vectors[:640]))
        if first.group_tokens == 1:
            parts = torch.cat([first.reconstruct(x) for x in torch.split(data.vectors[:640], 77)])
            torch.testing.assert_close(parts, seen, atol=1e-5, rtol=1e-5)
        assert method.frame == first.frame or kind == "value"


def test_more_bits_less_error() -> None:
    data = sample(rows=1024, dim=64)
    ladder = [error(m, data) for m in (Fp8(), TokenHeadInt(4), Kivi(2, 32), Kivi(1, 32))]
    assert ladder == sorted(ladder)
    assert ladder[0] < 2e-3
    assert math.isfinite(ladder[-1])


def test_refusals() -> None:
    data = sample()
    with pytest.raises(GsrqError, match="KIVI group: 32 does not divide the 16 elements of a head"):
        Kivi(2, 32).fit(sample("value"))
    with pytest.raises(GsrqError, match="KIVI group: 32 does not divide the 40 tokens"):
        Kivi(2, 32).fit(data).reconstruct(data.vectors[:40])
    with pytest.raises(GsrqError, match="CQ channels: 5 does not divide"):
        CoupledQuantization(5).fit(data)
    with pytest.raises(GsrqError, match="VQLLM width: 32 does not divide"):
        Vqllm().fit(data)
    with pytest.raises(GsrqError, match="60 calibration groups for 256 entries"):
        Vqllm(width=16).fit(sample(rows=30))
    with pytest.raises(GsrqError, match="gradient norms of 16 elements each do not add up to those of 8"):
        CoupledQuantization(8).fit(sample(gradients=2))
    with pytest.raises(GsrqError, match=r"bits: 9 is outside 1 \.\. 8"):
        TurboQuant(9)
    with pytest.raises(GsrqError, match="KIVI: bits 0"):
        Kivi(0)
    with pytest.raises(GsrqError, match="method 'k'"):
        Residual("k")  # type: ignore[arg-type]


def test_registry() -> None:
    known = registry()
    assert len({m.label for m in known.values()}) == len(known)
    assert len({type(m) for m in known.values()}) == 7
    assert known["gsrq-256x12"] == Residual("gskm", 256, 12, 40)
    short = registry(iterations=3)
    assert (short["kmeans-rq-128x16"].iterations, short["cq-8c8b"].iterations) == (3, 3)
    assert short["kivi-2"] == known["kivi-2"]
    assert list(chosen(["cq-8c8b", "fp8"])) == ["fp8", "cq-8c8b"]
    assert chosen(["fp8", "all"]) == known
    with pytest.raises(GsrqError, match="method 'kivy-1' is unknown") as caught:
        chosen(["fp8", "kivy-1"])
    assert "did you mean kivi-1?" in caught.value.mend


def test_the_registry_covers_the_rates() -> None:
    """Codes alone, on two heads of 128: who has a setting at a rate is there."""
    rates: dict[float, set[str]] = {}
    for id, method in registry().items():
        data = Sample("value", torch.randn(300, 2, 128, generator=torch.Generator().manual_seed(0)))
        if isinstance(method, Residual):
            bits = 8 * method.stages / method.width
        elif isinstance(method, Vqllm):
            bits = math.log2(method.entries) * method.stages / method.width
        else:
            small = replace(method, iterations=1) if isinstance(method, CoupledQuantization) else method
            bits = math.floor(4 * small.fit(data).bits_per_element(2, 128)) / 4
        rates.setdefault(bits, set()).add(id.split("-")[0])
    assert {8.0, 4.0, 2.0, 1.25, 1.0, 0.75, 0.5, 0.375} <= set(rates)
    for bits in (2.0, 1.0, 0.5):
        assert {"gsrq", "kmeans", "cq", "vqllm"} <= rates[bits]
    assert {"gsrq", "kmeans", "vqllm"} <= rates[1.25] & rates[0.75]
    assert {"gsrq", "kmeans"} <= rates[0.375]


@pytest.mark.parametrize(
    ("large", "small"),
    [
        (Residual("gskm", 16, 4, 3), Residual("gskm", 16, 2, 3)),
        (Residual("kmeans", 32, 3, 2), Residual("kmeans", 32, 1, 2)),
        (Vqllm(64, 3, 8, steps=4, batch=256), Vqllm(64, 2, 8, steps=4, batch=256)),
        (Fp8(), Fp8()),
    ],
)
def test_the_first_stages_are_those_of_a_separate_training(large: Method, small: Method) -> None:
    assert large.covers(small)
    assert families([small, TurboQuant(2), large]) == [[large, small], [TurboQuant(2)]]
    for kind in ("key", "value"):
        data = sample(kind, gradients=8)
        part, alone = small.narrowed(large.fit(data)), small.fit(data)
        for a, b in zip(part.shared_tensors(), alone.shared_tensors(), strict=True):
            assert torch.equal(a, b)
        assert part.shared_bytes == alone.shared_bytes
        assert part.bits_per_element(2, 16) == alone.bits_per_element(2, 16)
        assert torch.equal(part.reconstruct(data.vectors), alone.reconstruct(data.vectors))


def test_what_shares_no_training() -> None:
    base = Residual("gskm", 16, 4, 3)
    others = (Residual("kmeans", 16, 2, 3), Residual("gskm", 32, 2, 3), Residual("gskm", 16, 2, 4), Vqllm(64, 2))
    assert not any(base.covers(other) for other in others)
    assert not Residual("gskm", 16, 2, 3).covers(base)
    assert not Vqllm(64, 4).covers(Vqllm(128, 2))


@pytest.mark.parametrize("transform", [False, True])
def test_float32_codes_are_the_codebooks_but_for_near_ties(transform: bool) -> None:
    book = random_codebook(64, 32, 6, 1, transform)
    x = torch.randn(2000, 2, 32, generator=torch.Generator().manual_seed(4))
    exact = book.decode(book.encode(x.flatten(1))).reshape(x.shape)
    got = ResidualCodec(book).reconstruct(x)
    assert float(((got - exact).abs().amax((1, 2)) < 1e-5).float().mean()) > 0.998
    wide = ResidualCodec(book, beam=3).reconstruct(x)
    assert torch.equal(wide, book.decode(book.encode(x.flatten(1), 3)).reshape(x.shape))


def test_heads_are_refused_before_anything_is_fitted() -> None:
    for method, heads, message in (
        (Residual("gskm", 256, 12), (2, 64), "width: 256 does not divide the 128 elements of 2 KV heads"),
        (Kivi(2, 32), (2, 80), "KIVI group: 32 does not divide the 80"),
        (Vqllm(), (2, 80), "VQLLM width: 32 does not divide the 80"),
        (CoupledQuantization(16), (2, 24), "CQ channels: 16 does not divide the 24"),
    ):
        with pytest.raises(GsrqError, match=message):
            method.check_heads(*heads)
        method.check_heads(2, 128)


def test_gradients_are_captured_only_where_someone_looks() -> None:
    assert gradient_width([Fp8(), Kivi(), TurboQuant(2), Vqllm()]) is None
    assert gradient_width([Fp8(), Residual("gskm", 128, 16), Residual("gskm", 256, 12)]) == 128
    assert gradient_width([CoupledQuantization(8), Residual(width=128), CoupledQuantization(2)]) == 2

"""Fine-tuning of codewords against the model's own logits.

Codebooks are trained to code vectors; what counts is what the model then says. Here the frozen model runs with coded
keys and values under the cache rule, and codewords descend KL(model || coded model) over the traffic's tokens.
Codes are chosen as in deployment; gradients pass through the choice as if decoding were the identity (straight-through,
Bengio et al., arXiv 1308.3432) and reach the chosen codewords, and by the hidden states the layers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gsrq_export.cache.frame import Coder, framed_coder, rotate
from gsrq_export.cache.rule import CacheRule
from gsrq_export.capture import attend
from gsrq_export.codec.codebook import ENCODE_CHUNK, Codebook, LayerCodebooks, beam_search
from gsrq_export.errors import GsrqError
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import LayerSpec, ModelSpec

HOLD_OUT = 16  # every 16th sequence is kept back to measure
CHECKS = 5  # times the held-out sequences are measured on the way
WARM_UP = 0.05  # of the steps
CLIP = 1.0  # norm of all gradients together


@dataclass(frozen=True)
class Finetuning:
    """learning_rate is relative to the root mean square of a stage's codeword elements; batch in sequences."""

    steps: int = 100
    batch: int = 2
    learning_rate: float = 0.01
    beam: int = 1
    seed: int = 0


@dataclass(frozen=True)
class FinetuneLog:
    """KL(model || coded model) on held-out sequences, nats a token: the steps measured after, and the figures.

    The codebooks returned are those of the least figure; step 0 is before any training.
    """

    steps: list[int]
    held_out_kl: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Book(torch.nn.Module):
    """A codebook whose words are trained, as offsets in units of each stage's size."""

    def __init__(self, book: Codebook, beam: int) -> None:
        super().__init__()
        self.book, self.beam, self.transform, self.start = book, beam, book.transform, book.codewords.float()
        self.scale = (self.start**2).mean((2, 3), keepdim=True).sqrt()
        self.delta = torch.nn.Parameter(torch.zeros_like(self.start))

    def words(self) -> torch.Tensor:
        """float32 [G, R, K, D]."""
        return self.start + self.scale * self.delta

    def codes(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """[N, G * D] -> int64 [N, G, R]."""
        groups, _, _, width = words.shape
        stored = torch.einsum("gij,grkj->grki", self.transform, words)
        target = torch.einsum("gij,ngj->gni", self.transform, x.reshape(-1, groups, width))
        return torch.cat([beam_search(part, stored, self.beam) for part in torch.split(target, ENCODE_CHUNK, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What attention sees in the place of x [B, KV, T, d]; the gradient to x is that of the identity."""
        rows = x.detach().transpose(1, 2).flatten(2).flatten(0, 1)
        words = self.words()
        stages, size = words.shape[1:3]
        codes = self.codes(rows, words.detach()) + size * torch.arange(stages, device=x.device)
        parts = [
            functional.embedding_bag(codes[:, g], words[g].flatten(0, 1), mode="sum") for g in range(words.shape[0])
        ]
        decoded = torch.cat(parts, 1).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        return decoded + (x - x.detach())

    def codebook(self) -> Codebook:
        return replace(self.book, codewords=self.words().detach().half())


def key_coder(coder: Coder, book: Codebook, spec: ModelSpec, layer: LayerSpec) -> Coder:
    """A coder of keys before RoPE, out of one of vectors in the codebook's frame."""
    if book.center is None:
        return coder
    return framed_coder(coder, book.center, *spec.rope_tables[layer.rope_table], layer.rope_interleaved)


class CodedModel:
    """Handler that attends as the cache rule has it, over what the coders make of keys and values.

    Args:
        coders: of the keys and of the values of each layer; None leaves that side exact.
    """

    def __init__(self, spec: ModelSpec, coders: Sequence[tuple[Coder | None, Coder | None]], rule: CacheRule) -> None:
        self.spec, self.coders, self.rule = spec, coders, rule

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        layer = self.spec.layer(call.layer_idx)
        keys, values = self.coders[layer.index]
        if keys is None and values is None:
            return attend(call, self.spec)
        length = call.query.shape[2]
        cos, sin = (t[:length].to(call.query.device)[None] for t in self.spec.rope_tables[layer.rope_table])
        coded_key = keys(call.key) if keys else call.key
        coded_value = values(call.value) if values else call.value
        arguments = (call.query, call.key, call.value, coded_key, coded_value, cos, sin, layer, self.rule)
        if not torch.is_grad_enabled():
            return attend_coded(*arguments)
        found: torch.Tensor = checkpoint(attend_coded, *arguments, use_reentrant=False)
        return found


def attend_coded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    coded_key: torch.Tensor,
    coded_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layer: LayerSpec,
    rule: CacheRule,
) -> torch.Tensor:
    """Attention in which each query sees coded what token-by-token decoding would show it coded; differentiable.

    Args:
        query: [B, num_heads, T, head_dim], before RoPE; keys and values [B, num_kv_heads, T, head_dim].
        cos, sin: [1, T, rope_dim / 2].
    Returns:
        [B, T, num_heads, head_dim].
    """
    batch, heads, length, head_dim = query.shape
    query, key, coded_key = (rotate(x, cos, sin, layer.rope_interleaved) for x in (query, key, coded_key))
    query = query.reshape(batch, layer.num_kv_heads, -1, length, head_dim)
    position = torch.arange(length, device=query.device)
    here, there = position[:, None], position
    is_coded = (there >= rule.sinks) & (there < rule.sinks + rule.coded(here + 1))
    coded_score, exact_score = (torch.einsum("bkgtd,bkld->bkgtl", query, of) for of in (coded_key, key))
    score = torch.where(is_coded, coded_score, exact_score) * layer.scale
    if layer.softcap:
        score = layer.softcap * torch.tanh(score / layer.softcap)
    hidden = there > here
    if layer.sliding_window:
        hidden = hidden | (here - there >= layer.sliding_window)
    weight = score.masked_fill(hidden, float("-inf")).softmax(-1)
    out = torch.einsum("bkgtl,bkld->btkgd", weight * is_coded, coded_value)
    out = out + torch.einsum("bkgtl,bkld->btkgd", weight * ~is_coded, value)
    return out.reshape(batch, length, heads, head_dim)


def finetune(
    model: torch.nn.Module,
    spec: ModelSpec,
    ids: torch.Tensor,
    layers: Sequence[LayerCodebooks],
    rule: CacheRule,
    settings: Finetuning,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[list[LayerCodebooks], FinetuneLog]:
    """Train the codewords of all layers together; codes per token, stages and metric stay.

    Args:
        model: frozen, float32.
        ids: int64 [N, T] of traffic, N >= 2; every 16th sequence (the last, where there are fewer) is held out.
        progress: called with 1 after each step.
    Returns:
        The codebooks with the least held-out KL, and the log.
    Raises:
        GsrqError: sequences in which nothing is coded, or fewer than two.
    """
    if len(ids) < 2 or rule.coded(ids.shape[1]) < 1:
        raise GsrqError(
            f"fine-tuning: {len(ids)} sequences of {ids.shape[1]} tokens, of which "
            f"{rule.coded(ids.shape[1])} are coded",
            "give two or more sequences, longer than sinks + window + block",
        )
    device = next(model.parameters()).device
    books = [
        (_Book(pair.keys.to(device), settings.beam), _Book(pair.values.to(device), settings.beam)) for pair in layers
    ]
    held = torch.arange(len(ids)) % HOLD_OUT == min(HOLD_OUT, len(ids)) - 1
    train, test = ids[~held], ids[held]
    trained = [book.delta for pair in books for book in pair]
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(settings.seed)
    coders = [
        (key_coder(keys, keys.book, spec, layer), values)
        for layer, (keys, values) in zip(spec.layers, books, strict=True)
    ]
    student = CodedModel(spec, coders, rule)
    order = torch.empty(0, dtype=torch.int64)
    checks = {round(settings.steps * i / CHECKS) for i in range(1, CHECKS + 1)}
    log = FinetuneLog([0], [_held_out(model, spec, student, test, settings.batch)])
    best = [p.detach().clone() for p in trained]
    for step in range(settings.steps):
        while len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        rows, order = train[order[: settings.batch]], order[settings.batch :]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        # Of the codewords alone, whatever else could be trained.
        gradients = torch.autograd.grad(_divergence(model, spec, student, rows), trained)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if step + 1 in checks:
            found = _held_out(model, spec, student, test, settings.batch)
            if found < min(log.held_out_kl):
                best = [p.detach().clone() for p in trained]
            log.steps.append(step + 1)
            log.held_out_kl.append(found)
        progress(1)
    for parameter, data in zip(trained, best, strict=True):
        parameter.data = data
    return [LayerCodebooks(keys.codebook(), values.codebook()) for keys, values in books], log


def _schedule(step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to nothing."""
    warm = max(1, round(WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _divergence(model: torch.nn.Module, spec: ModelSpec, student: CodedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean KL(model || coded model) in nats over the tokens of the rows."""
    rows = rows.to(next(model.parameters()).device)
    with torch.no_grad(), intercept(model, lambda call: attend(call, spec)):
        target = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
    with intercept(model, student):
        found = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        return functional.kl_div(found.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")


@torch.no_grad()
def _held_out(model: torch.nn.Module, spec: ModelSpec, student: CodedModel, rows: torch.Tensor, batch: int) -> float:
    total = sum(float(_divergence(model, spec, student, part)) * len(part) for part in torch.split(rows, max(1, batch)))
    return total / len(rows)

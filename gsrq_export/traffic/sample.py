"""Traffic sampled from the model itself, for users who have no text of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from gsrq_export.errors import GsrqError
from gsrq_export.traffic.recall_passages import Ids

BATCH = 64  # part of the result: each batch draws from its own generator


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Grows inside one buffer: concatenation would copy the whole cache for every token."""

    capacity = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_keys"):
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            batch, heads, _, head_dim = key_states.shape
            self._keys = key_states.new_empty(batch, heads, self.capacity, head_dim)
            self._values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
            self.keys, self.values = self._keys[:, :, :0], self._values[:, :, :0]
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self.keys, self.values = self._keys[:, :, :stop], self._values[:, :, :stop]
        return self.keys, self.values


def sample_sequences(
    model: Any,
    first_token: int,
    count: int,
    length: int,
    temperature: float,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Ids:
    """Sample from a causal decoder; an end-of-text token begins the next document of the sequence.

    Args:
        model: in eval mode; its own device is used.
        first_token: what every sequence starts with (begin or end of text).
        progress: called with the tokens sampled so far.
    Returns:
        int64 [count, length]; the same for the same seed on the same kind of device.
    Raises:
        GsrqError: the model's logits are not finite.
    """
    layer = type("_Layer", (_PreallocatedLayer,), {"capacity": length})
    rows: list[Ids] = []
    done = 0
    for index, start in enumerate(range(0, count, BATCH)):
        batch = min(BATCH, count - start)
        rng = np.random.default_rng([seed, index])
        ids = np.full((batch, length), first_token, np.int64)
        cache = Cache(layer_class_to_replicate=layer)
        with torch.inference_mode():
            for i in range(1, length):
                last = torch.from_numpy(ids[:, i - 1 : i]).to(model.device)
                logits = model(last, past_key_values=cache, use_cache=True).logits[:, -1]
                ids[:, i] = _draw(logits.double().cpu() / temperature, rng)
                done += batch
                if progress:
                    progress(done)
        rows.append(ids)
    return np.concatenate(rows)


def _draw(logits: torch.Tensor, rng: np.random.Generator) -> Ids:
    """One token a row by the Gumbel maximum, from numpy's generator: torch's differs between devices. [B, vocab]."""
    if not bool(torch.isfinite(logits).all()):
        raise GsrqError("the model's logits are not finite while sampling traffic", "check the model's weights")
    noise = -np.log(-np.log(rng.random(tuple(logits.shape)) + 1e-300))
    return np.asarray((logits.numpy() + noise).argmax(-1), dtype=np.int64)

"""A layer's pages in vLLM's pool, as the operator's tensors.

The pool gives a layer one dense tensor of equal pages. Codes of keys and of values each lie densely, as the kernels
take them: first the keys' part of all pages, then the values'. So a page's bytes do not lie together, and vLLM must
not copy or clear pages by itself: the backend refuses what would (prefix caching, connectors).
How codes are ordered within a page is the layer's matter; nothing here reads them by token.
A sequence's first pages, keys' parts then values', are the bytes of its exact keys, then exact values.
"""

from __future__ import annotations

import torch

from gsrq_export.cache.rule import CacheRule
from gsrq_export.cuda.check import LayerShape
from gsrq_export.errors import GsrqError


class LayerPages:
    """Args:
        pool: int8 [pages, 1, tokens a page, bytes], contiguous: the layer's tensor.
        shape: the layer's.
        exact_dtype: of the exact buffers.
        exact_pages: a sequence's first pages, which hold them.
    Raises:
        GsrqError: the tensor is not dense, or too small.

    Attributes:
        key_codes, value_codes: int8 [pages, tokens a page, code bytes], views; codes in the layer's order.
    """

    def __init__(self, pool: torch.Tensor, shape: LayerShape, exact_dtype: torch.dtype, exact_pages: int) -> None:
        if pool.ndim != 4 or pool.shape[1] != 1 or pool.dtype != torch.int8 or not pool.is_contiguous():
            raise GsrqError(
                f"the layer's cache is {pool.dtype} {list(pool.shape)} with strides {list(pool.stride())}",
                "it must be dense int8 [pages, 1, tokens a page, bytes]: use the layout LBHNC",
            )
        pages, _, page, size = pool.shape
        keys, values = shape.key_bytes, shape.value_bytes
        exact = (2, shape.kv_heads, shape.rule.exact_slots, shape.head_dim)
        self.exact_bytes = torch.Size(exact).numel() * exact_dtype.itemsize
        if size < keys + values or exact_pages * page * (keys + values) < self.exact_bytes:
            raise GsrqError(
                f"{exact_pages} pages of {page} tokens of {size} bytes for {keys + values} bytes of codes a token and "
                f"{self.exact_bytes} of exact tokens",
                "serve the artifact that GSRQ_ARTIFACT named when vLLM started",
            )
        flat, split = pool.view(-1), pages * page * keys
        self.key_codes = flat[:split].view(pages, page, keys)
        self.value_codes = flat[split : split + pages * page * values].view(pages, page, values)
        self.exact_pages, self._exact, self._dtype, self._rule = exact_pages, exact, exact_dtype, shape.rule

    @property
    def rule(self) -> CacheRule:
        return self._rule

    def read_exact(self, table: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of sequences' exact buffers; slots that no token wrote are zero: pages come with anything in them.

        Args:
            table: integers [B, pages of a row], the sequences' pages.
            past: int64 [B], their tokens.
        Returns:
            keys, values, each [B, KV heads, exact slots, head_dim].
        """
        first = table[:, : self.exact_pages].long()
        parts = [codes.flatten(1)[first].flatten(1) for codes in (self.key_codes, self.value_codes)]
        raw = torch.cat(parts, 1)[:, : self.exact_bytes].contiguous()
        exact = raw.view(self._dtype).view(-1, *self._exact)
        unwritten = (self._rule.slot_tokens(past) < 0)[:, None, None, :, None]
        exact = exact.masked_fill(unwritten, 0.0)
        # Copies even of one row: the kernels want them aligned.
        return exact[:, 0].clone(memory_format=torch.contiguous_format), exact[:, 1].clone(
            memory_format=torch.contiguous_format
        )

    def write_exact(self, table: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put buffers that `read_exact` gave back into their pages."""
        first = table[:, : self.exact_pages].long()
        sides = [codes.flatten(1) for codes in (self.key_codes, self.value_codes)]
        split = self.exact_pages * sides[0].shape[1]
        room = split + self.exact_pages * sides[1].shape[1]
        raw = torch.stack([keys, values], 1).flatten(1).view(torch.int8)
        raw = torch.nn.functional.pad(raw, (0, room - raw.shape[1]))
        for side, part in zip(sides, (raw[:, :split], raw[:, split:]), strict=True):
            side[first] = part.reshape(*first.shape, side.shape[1])

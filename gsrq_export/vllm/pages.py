"""A layer's pages in vLLM's pool, as the operator's tensors.

The pool gives a layer one dense tensor of equal pages. Codes of keys and of values each lie densely, as the kernels
take them: first the keys' part of all pages, then the values'. So a page's bytes do not lie together, and vLLM must
not copy or clear pages by itself: the backend refuses what would (prefix caching, connectors).
How codes are ordered within a page is the layer's matter; nothing here reads them by token.
A sequence's first pages, keys' parts then values', are the bytes of its exact keys, then exact values.
"""

from __future__ import annotations

import torch

from gsrq_export.cuda.check import LayerShape
from gsrq_export.cuda.rows import ExactPages
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
        exact_bytes = shape.exact_bytes(exact_dtype)
        if size < keys + values or exact_pages * page * (keys + values) < exact_bytes:
            raise GsrqError(
                f"{exact_pages} pages of {page} tokens of {size} bytes for {keys + values} bytes of codes a token and "
                f"{exact_bytes} of exact tokens",
                "serve the artifact that GSRQ_ARTIFACT named when vLLM started",
            )
        flat, split = pool.view(-1), pages * page * keys
        self.key_codes = flat[:split].view(pages, page, keys)
        self.value_codes = flat[split : split + pages * page * values].view(pages, page, values)
        self._exact_dtype = exact_dtype

    def exact(self, table: torch.Tensor) -> ExactPages:
        """Sequences' exact buffers.

        Args:
            table: int32 [B, exact pages], the sequences' first pages.
        """
        return ExactPages(self.key_codes.flatten(1), self.value_codes.flatten(1), table, self._exact_dtype)

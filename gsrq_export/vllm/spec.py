"""How many of vLLM's pages a sequence has: some for its exact buffers, then one for each page of coded tokens.

vLLM's own rule, a page for every ``block_size`` tokens, knows no part of fixed size. The specification and the
manager registered here count pages by the cache rule instead, so that admission, preemption and the pool's size are
those of the coded cache.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from gsrq_export.cache.rule import CacheRule

# Built-in specifications register themselves only while there is none: have them do so first.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


class GsrqManager(FullAttentionManager):  # type: ignore[misc]
    """Gives a sequence the pages that its specification counts."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """As vLLM's, whose count of pages follows from a number of tokens: the one with as many pages is given."""
        tokens = self.kv_cache_spec.as_tokens(num_tokens)
        count: int = super().get_num_blocks_to_allocate(request_id, tokens, *args, **kwargs)
        return count

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, with the tokens that `get_num_blocks_to_allocate` counted by."""
        return super().allocate_new_blocks(request_id, self.kv_cache_spec.as_tokens(num_tokens), *args, **kwargs)


@register_kv_cache_spec(manager_class=GsrqManager)
@dataclass(frozen=True, kw_only=True)
class GsrqSpec(FullAttentionSpec):  # type: ignore[misc]
    """A layer's coded cache. A page holds the codes of ``block_size`` tokens, or a part of the exact buffers.

    Attributes:
        rule: which tokens are coded.
        exact_pages: pages that hold a sequence's exact buffers.
    """

    rule: CacheRule
    exact_pages: int

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens; none if it has none."""
        return self.exact_pages - (-self.rule.coded(tokens) // self.block_size) if tokens > 0 else 0

    def as_tokens(self, tokens: int) -> int:
        """The tokens to which vLLM's own rule gives as many pages."""
        page: int = self.block_size
        return self.pages(tokens) * page

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of one sequence of the longest text."""
        size: int = self.page_size_bytes
        return self.pages(vllm_config.model_config.max_model_len) * size

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of the worker's block table."""
        return self.pages(max_len)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """The specification of a group, whose layers must all have the same."""
        assert all(spec == specs[0] for spec in specs), "layers of one group must have the same specification"
        return copy.deepcopy(specs[0])

"""The part of vLLM's published interface that the backend meets: vLLM's own where it is installed, else classes
written from its documentation, which count a sequence's pages by the published rule.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import torch

REAL = importlib.util.find_spec("vllm") is not None
M = TypeVar("M")


@dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionCGSupport(Enum):
    NEVER = 0


class AttentionBackend(ABC):
    @staticmethod
    @abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type: ...

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return spec


class AttentionImpl(ABC, Generic[M]):
    @abstractmethod
    def __init__(self, *arguments: Any, **others: Any) -> None: ...

    @abstractmethod
    def forward(self, *arguments: Any, **others: Any) -> torch.Tensor: ...


class AttentionMetadataBuilder(ABC, Generic[M]):
    @abstractmethod
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec = kv_cache_spec

    @abstractmethod
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> M: ...


class KVCacheLayout(Enum):
    LBHNC = (0, 1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    head_size_v: int
    num_head_slots: int | None = None
    state_content_bytes: int | None = None

    @property
    def page_size_bytes(self) -> int:
        cell = self.state_content_bytes or (self.head_size + self.head_size_v) * self.dtype.itemsize
        return (self.num_head_slots or self.num_kv_heads) * self.block_size * cell


class FullAttentionManager:
    """ceil(tokens / block_size) pages a sequence, from a pool whose page 0 belongs to nobody."""

    def __init__(self, kv_cache_spec: Any, free: list[int]) -> None:
        self.kv_cache_spec, self.block_size, self.pool = kv_cache_spec, kv_cache_spec.block_size, free
        self.req_to_blocks: dict[str, list[Any]] = {}

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        return max(-(-num_tokens // self.block_size) - len(self.req_to_blocks.get(request_id, [])), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        count = FullAttentionManager.get_num_blocks_to_allocate(self, request_id, num_tokens)
        new = [types.SimpleNamespace(block_id=self.pool.pop()) for _ in range(count)]
        self.req_to_blocks.setdefault(request_id, []).extend(new)
        return new

    def free(self, request_id: str) -> None:
        self.pool.extend(block.block_id for block in self.req_to_blocks.pop(request_id, []))


class KVCacheSpecRegistry:
    managers: dict[type, type] = {}  # noqa: RUF012

    @classmethod
    def check_kv_cache_spec_registry(cls, kv_cache_spec: dict[str, Any]) -> None: ...

    @classmethod
    def get_manager_class(cls, kvcache_spec: Any) -> type | None:
        return cls.managers.get(type(kvcache_spec))


def register_kv_cache_spec(manager_class: type) -> Any:
    def keep(spec: type) -> type:
        KVCacheSpecRegistry.managers[spec] = manager_class
        return spec

    return keep


class AttentionBackendEnum(Enum):
    CUSTOM = None

    def is_overridden(self) -> bool:
        return bool(overrides)

    def get_path(self) -> str:
        return overrides[self]

    def clear_override(self) -> None:
        overrides.clear()


overrides: dict[AttentionBackendEnum, str] = {}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    overrides[backend] = class_path


MODULES = {
    "vllm.v1.attention.backend": (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadataBuilder,
        AttentionCGSupport,
        MultipleOf,
    ),
    "vllm.v1.attention.backends.registry": (AttentionBackendEnum, register_backend),
    "vllm.v1.kv_cache_interface": (FullAttentionSpec, KVCacheLayout),
    "vllm.v1.kv_cache_spec_registry": (KVCacheSpecRegistry, register_kv_cache_spec),
    "vllm.v1.core.single_type_kv_cache_manager": (FullAttentionManager,),
}


def install() -> None:
    """Make the modules importable."""
    if REAL:
        os.environ["VLLM_TARGET_DEVICE"] = "cpu"
        return
    for name, members in MODULES.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        for member in members:
            setattr(sys.modules[name], member.__name__, member)


def manager_of(spec: Any, pages: int) -> Any:
    """The manager that vLLM gives a group of the specification, over a pool of ``pages``."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as Registry

    kind = Registry.get_manager_class(spec)
    if not REAL:
        return kind(spec, list(range(1, pages)))  # type: ignore[misc]
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(pages, enable_caching=False, hash_block_size=spec.block_size)
    return kind(spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=spec.block_size)


class Scheduler:
    """Pages and metadata of a step as vLLM's scheduler and model runner would make them, one group of layers."""

    def __init__(self, spec: Any, pages: int, device: str = "cpu") -> None:
        self.spec, self.pages, self.manager, self.device = spec, pages, manager_of(spec, pages), device
        self.tokens: dict[str, int] = {}

    def pool(self) -> torch.Tensor:
        """A layer's cache, with anything in it: these bytes are NaN as floats."""
        shape = (self.pages, 1, self.spec.block_size, self.spec.state_content_bytes)
        return torch.full(shape, 127, dtype=torch.int8, device=self.device)

    def held(self, name: str) -> int:
        return len(self.manager.req_to_blocks.get(name, []))

    def end(self, name: str) -> None:
        self.manager.free(name)
        del self.tokens[name]

    def step(self, calls: list[tuple[str, int]]) -> Any:
        """Common metadata of a step in which sequences get so many new tokens."""
        totals, width = [], self.spec.pages(10**4)
        table = torch.full((len(calls), width), 0, dtype=torch.int32)
        for row, (name, new) in enumerate(calls):
            total = self.tokens.get(name, 0) + new
            before = self.held(name)
            needed = self.manager.get_num_blocks_to_allocate(name, total, [], 0, 0, total)
            self.manager.allocate_new_blocks(name, total, total)
            assert self.held(name) - before == needed, "what admission counts is what is taken"
            ids = [block.block_id for block in self.manager.req_to_blocks[name]]
            table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.tokens[name] = total
            totals.append(total)
        starts = torch.tensor([0, *(new for _, new in calls)]).cumsum(0).int()
        return types.SimpleNamespace(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(totals, dtype=torch.int32, device=self.device),
            num_reqs=len(calls),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(new for _, new in calls),
            max_seq_len=max(totals) + 3,  # may be an upper bound
            block_table_tensor=table.to(self.device),
        )


def config_of(layers: dict[str, Any], longest: int, **changes: Any) -> Any:
    """The part of VllmConfig that is read; layers: the implementations by their layers' names."""
    given = {"prefix": False, "chunked": True, "speculative": None, **changes}
    context = {name: types.SimpleNamespace(impl=impl) for name, impl in layers.items()}
    return types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=context),
        cache_config=types.SimpleNamespace(enable_prefix_caching=given["prefix"]),
        scheduler_config=types.SimpleNamespace(enable_chunked_prefill=given["chunked"]),
        speculative_config=given["speculative"],
        model_config=types.SimpleNamespace(max_model_len=longest),
    )

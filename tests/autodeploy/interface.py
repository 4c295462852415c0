"""The part of AutoDeploy's published interface that a descriptor meets, written from its documentation.

TensorRT-LLM is not installable here. These are the classes that gsrq_export.autodeploy derives from, and the rule by
which insert_cached_attention replaces a source node: (*qkv, *standard metadata, *caches, *constants).
"""

from __future__ import annotations

import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class SequenceInfo:
    max_num_state_slots: int
    max_seq_len: int
    device: str = "cpu"


class ResourceHandler(ABC):
    @abstractmethod
    def allocate(self, sequence_info: SequenceInfo) -> torch.Tensor: ...


class UnpagedResourceHandler(ResourceHandler):
    def __init__(self, *token_shape: int, dtype: torch.dtype) -> None:
        self.token_shape, self.dtype = token_shape, dtype

    def allocate(self, sequence_info: SequenceInfo) -> torch.Tensor:
        shape = (sequence_info.max_num_state_slots, sequence_info.max_seq_len, *self.token_shape)
        return dirty(shape, self.dtype)


class StateResourceHandler(ResourceHandler):
    def __init__(self, *state_shape: int, dtype: torch.dtype) -> None:
        self.state_shape, self.dtype = state_shape, dtype

    def allocate(self, sequence_info: SequenceInfo) -> torch.Tensor:
        return dirty((sequence_info.max_num_state_slots, *self.state_shape), self.dtype)


class AttentionDescriptor(ABC):
    @classmethod
    @abstractmethod
    def get_attention_layout(cls) -> str: ...

    @classmethod
    @abstractmethod
    def get_num_qkv_args(cls) -> int: ...

    @classmethod
    @abstractmethod
    def get_source_attention_op(cls) -> Any: ...

    @classmethod
    @abstractmethod
    def get_cached_attention_op(cls) -> Any: ...

    @classmethod
    @abstractmethod
    def get_standard_metadata_args(cls) -> list[str]: ...

    @classmethod
    @abstractmethod
    def get_cache_initializers(cls, source_attn_node: Any, cache_config: Any) -> dict[str, ResourceHandler]: ...

    @classmethod
    def get_prepare_extra_metadata_info(cls, any_source_attn_node: Any) -> tuple[Any, int, list[Any]]:
        return None, 0, []

    @classmethod
    def get_constants(cls, source_attn_node: Any) -> list[int | float | str | None]:
        return []


class AttentionRegistry:
    found: dict[str, Any]

    @classmethod
    def register(cls, name: str) -> Callable[[Any], Any]:
        def keep(descriptor: Any) -> Any:
            cls.found[name] = descriptor
            return descriptor

        return keep

    @classmethod
    def has(cls, name: str) -> bool:
        return name in cls.found


def dirty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What torch.empty may give."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 85, dtype=dtype)


def module() -> Any:
    """The interface as a module, with a registry of its own."""
    made = types.ModuleType("attention_interface")
    registry = type("AttentionRegistry", (AttentionRegistry,), {"found": {}})
    for kind in (AttentionDescriptor, StateResourceHandler, UnpagedResourceHandler):
        setattr(made, kind.__name__, kind)
    made.AttentionRegistry = registry  # type: ignore[attr-defined]
    return made


@torch.library.custom_op("auto_deploy::torch_attention", mutates_args=())
def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    layout: str = "bnsd",
) -> torch.Tensor:
    raise AssertionError("all are replaced")


@torch_attention.register_fake
def _(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(query)


def insert_cached_attention(
    graph_module: torch.fx.GraphModule, descriptor: Any, info: SequenceInfo
) -> dict[str, torch.Tensor]:
    """Replace every source node; returns the caches, by the names of the graph's new inputs."""
    graph, caches = graph_module.graph, {}
    source = descriptor.get_source_attention_op()
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target.overloadpacket is source]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        metadata = [graph.placeholder(name) for name in descriptor.get_standard_metadata_args()]
    for i, node in enumerate(nodes):
        own = []
        for name, handler in descriptor.get_cache_initializers(node, None).items():
            caches[f"{name}_{i}"] = handler.allocate(info)
            with graph.inserting_before(nodes[0] if i == 0 else node):
                own.append(graph.placeholder(f"{name}_{i}"))
        constants = descriptor.get_constants(node)
        arguments = (*node.args[: descriptor.get_num_qkv_args()], *metadata, *own, *constants)
        with graph.inserting_before(node):
            replaced = graph.call_function(descriptor.get_cached_attention_op(), arguments)
        node.replace_all_uses_with(replaced)
        graph.erase_node(node)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in inputs:
        first.prepend(node)
    graph_module.recompile()
    return caches

"""The attention descriptor that AutoDeploy looks up by name, made for the interface that is installed.

Written against tensorrt_llm/_torch/auto_deploy/custom_ops/attention_interface.py as published in NVIDIA/TensorRT-LLM
around commit 086f0cea878b (2026), whose descriptors return resource handlers. `register` refuses another interface.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from gsrq_export.autodeploy.attention import slot_attention
from gsrq_export.errors import GsrqError
from gsrq_export.hosting.layers import ArtifactLayer, artifact_layers, differences

BACKEND = "gsrq"
INTERFACE = "tensorrt_llm._torch.auto_deploy.custom_ops.attention_interface"
NEEDED = ("AttentionDescriptor", "AttentionRegistry", "StateResourceHandler", "UnpagedResourceHandler")
METADATA = ["batch_info_host", "seq_len", "input_pos", "slot_idx", "cu_seqlen"]
# The source operator's arguments after query, key and value.
SOURCE_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "sinks", "sliding_window", "logit_cap", "layout")


def register(artifact: str | Path) -> Any:
    """Register the backend "gsrq" with AutoDeploy for the artifact's model; in the process that builds the model.

    Raises:
        GsrqError: TensorRT-LLM is not installed, has another interface, or has a backend of that name.
        ArtifactError: the artifact is not sound.
    """
    try:
        interface: Any = importlib.import_module(INTERFACE)
    except ImportError as error:
        raise GsrqError(
            f"TensorRT-LLM's AutoDeploy cannot be imported: {error}", "install tensorrt_llm on the serving machine"
        ) from error
    descriptor = make_descriptor(interface, Path(artifact).resolve())
    if interface.AttentionRegistry.has(BACKEND):
        raise GsrqError(f"AutoDeploy has a backend {BACKEND!r} already", "register one artifact a process")
    return interface.AttentionRegistry.register(BACKEND)(descriptor)


def make_descriptor(interface: Any, artifact: Path) -> Any:
    """The descriptor's class.

    Args:
        interface: the module INTERFACE.
    Raises:
        GsrqError: the module lacks a class, or its descriptors have abstract methods that are not known here.
    """
    lacking = [name for name in NEEDED if not hasattr(interface, name)]
    if lacking:
        raise _other_interface(f"it has no {', '.join(lacking)}")
    found = artifact_layers(artifact)
    exact_dtype = getattr(torch, found.metadata.exact_dtype)
    exact_slots = found.metadata.rule.exact_slots

    class Codes(interface.UnpagedResourceHandler):  # type: ignore[misc]
        """Zeroed: what no token wrote must be finite."""

        def allocate(self, sequence_info: Any) -> torch.Tensor:
            tensor: torch.Tensor = super().allocate(sequence_info)
            return tensor.zero_()

    class Exact(interface.StateResourceHandler):  # type: ignore[misc]
        def allocate(self, sequence_info: Any) -> torch.Tensor:
            tensor: torch.Tensor = super().allocate(sequence_info)
            return tensor.zero_()

    class GsrqDescriptor(interface.AttentionDescriptor):  # type: ignore[misc]
        @classmethod
        def get_attention_layout(cls) -> str:
            return "bsnd"

        @classmethod
        def get_num_qkv_args(cls) -> int:
            return 3

        @classmethod
        def get_source_attention_op(cls) -> Any:
            return torch.ops.auto_deploy.torch_attention

        @classmethod
        def get_cached_attention_op(cls) -> Any:
            return torch.ops.gsrq.slot_attention.default

        @classmethod
        def get_standard_metadata_args(cls) -> list[str]:
            return list(METADATA)

        @classmethod
        def get_cache_initializers(cls, source_attn_node: Any, cache_config: Any) -> dict[str, Any]:
            shape = found.layers[_index(source_attn_node)].shape
            exact = (shape.num_kv_heads, exact_slots, shape.head_dim)
            return {
                "key_codes": Codes(shape.key_bytes, dtype=torch.int8),
                "value_codes": Codes(shape.value_bytes, dtype=torch.int8),
                "key_exact": Exact(*exact, dtype=exact_dtype),
                "value_exact": Exact(*exact, dtype=exact_dtype),
            }

        @classmethod
        def get_constants(cls, source_attn_node: Any) -> list[int | float | str | None]:
            index = _index(source_attn_node)
            if index >= len(found.layers):
                raise GsrqError(
                    f"the model attends in more layers than the artifact's {len(found.layers)}",
                    "serve the model that the artifact was built from",
                )
            _check_node(source_attn_node, found.layers[index], index)
            return [str(artifact), index]

    unknown = sorted(getattr(GsrqDescriptor, "__abstractmethods__", ()))
    if unknown:
        raise _other_interface(f"its descriptors must also have {', '.join(unknown)}")
    return GsrqDescriptor


def _other_interface(difference: str) -> GsrqError:
    return GsrqError(
        f"this TensorRT-LLM has another AutoDeploy interface: {difference}",
        "use a version with the interface that docs/deploy-trtllm.md names",
    )


def _index(node: Any) -> int:
    """Which layer a source node is. Nodes before it may have been replaced by ours already."""
    index = 0
    for other in node.graph.nodes:
        if other is node:
            return index
        index += other.op == "call_function" and _packet(other.target) in (
            torch.ops.auto_deploy.torch_attention,
            torch.ops.gsrq.slot_attention,
        )
    raise ValueError("the node is not in its graph")


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


def _check_node(node: Any, layer: ArtifactLayer, index: int) -> None:
    """Refuse attention that is not what the artifact's codebooks were trained for."""
    given = {**dict(zip(SOURCE_ARGUMENTS, node.args[3:], strict=False)), **node.kwargs}
    key = node.args[1].meta["val"]
    if given.get("layout") != "bsnd":
        raise GsrqError(f"layer {index}: attention of layout {given.get('layout')!r}", "AutoDeploy should pass bsnd")
    wrong = differences(
        layer,
        int(key.shape[2]),
        int(key.shape[3]),
        key.shape[3] ** -0.5 if given.get("scale") is None else float(given["scale"]),
        float(given.get("logit_cap") or 0.0),
        int(given.get("sliding_window") or 0),
    )
    if given.get("sinks") is not None:
        wrong.append("attention sinks")
    if given.get("is_causal") is False or given.get("dropout_p"):
        wrong.append("attention that is not causal, or with dropout")
    if wrong:
        raise GsrqError(
            f"layer {index} of the served model has {'; '.join(wrong)} as the artifact has it",
            "serve the artifact's own model, unsharded (world_size 1)",
        )


__all__ = ["BACKEND", "INTERFACE", "make_descriptor", "register", "slot_attention"]

"""The coded cache as an attention backend of vLLM, registered out of tree (docs/deploy-vllm.md).

Written against the interface of vLLM 0.33.0. ``register`` is the entry point of the group vllm.general_plugins.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from gsrq_export.errors import GsrqError
from gsrq_export.vllm.served import ENVIRONMENT, served_artifact

BACKEND = "gsrq_export.vllm.backend.GsrqBackend"
REGISTRY = "vllm.v1.attention.backends.registry"
NEEDED = {
    REGISTRY: ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.attention.backend": ("AttentionBackend", "AttentionImpl", "AttentionMetadataBuilder", "MultipleOf"),
    "vllm.v1.kv_cache_interface": ("FullAttentionSpec", "KVCacheLayout"),
    "vllm.v1.kv_cache_spec_registry": ("KVCacheSpecRegistry", "register_kv_cache_spec"),
    "vllm.v1.core.single_type_kv_cache_manager": ("FullAttentionManager",),
}

__all__ = ["BACKEND", "ENVIRONMENT", "register"]


def register() -> None:
    """Register the backend as vLLM's CUSTOM one where GSRQ_ARTIFACT names an artifact; else do nothing.

    vLLM calls it in each of its processes, some more than once.

    Raises:
        GsrqError: vLLM has another interface, another plugin's CUSTOM backend, or the artifact cannot be served.
        ArtifactError: the artifact is not sound.
    """
    if not os.environ.get(ENVIRONMENT):
        return
    for name, members in NEEDED.items():
        try:
            module: Any = importlib.import_module(name)
        except ImportError as error:
            raise _other_interface(f"{name} cannot be imported: {error}") from error
        lacking = [member for member in members if not hasattr(module, member)]
        if lacking:
            raise _other_interface(f"{name} has no {', '.join(lacking)}")
    backend: Any = importlib.import_module("vllm.v1.attention.backend").AttentionBackend
    if not hasattr(backend, "customize_spec"):
        raise _other_interface("its backends have no customize_spec")
    registry: Any = importlib.import_module(REGISTRY)
    custom = registry.AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        raise GsrqError(
            f"vLLM's CUSTOM attention backend is {custom.get_path()} already",
            "let VLLM_PLUGINS name one plugin with such a backend",
        )
    served_artifact()
    registry.register_backend(custom, BACKEND)


def _other_interface(difference: str) -> GsrqError:
    return GsrqError(f"this vLLM has another interface: {difference}", "use the version that docs/deploy-vllm.md names")

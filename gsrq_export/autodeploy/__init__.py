"""The coded cache as an attention backend of TensorRT-LLM's AutoDeploy (docs/deploy-trtllm.md)."""

from gsrq_export.autodeploy.descriptor import BACKEND, register

__all__ = ["BACKEND", "register"]

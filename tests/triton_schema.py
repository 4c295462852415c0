"""Triton's own schema of config.pbtxt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format


def model_config_proto() -> ModuleType:
    """Triton's generated ModelConfig; loaded by path, as importing its package needs gRPC."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient, which has Triton's configuration schema, is not installed")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(directory: Path) -> tuple[Any, ModuleType]:
    proto = model_config_proto()
    return text_format.Parse((directory / "config.pbtxt").read_text(), proto.ModelConfig()), proto

"""Cache keys: sha256 over everything that can change a stage's result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gsrq_export.errors import GsrqError

LIBRARIES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "onnx", "onnxruntime", "onnxscript")


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Versions and code that every stage depends on: Python, libraries, and the sha256 of this package's sources."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "gsrq_export": code_hash()}
    for library in LIBRARIES:
        found[library] = metadata.version(library)
    return found


@lru_cache(maxsize=1)
def code_hash() -> str:
    """sha256 over the names and contents of all Python files of the package."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package)
        if name.parts[0] != "_bundled":
            content = file.read_bytes()
            digest.update(f"{name.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal; never the whole file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def stage_key(name: str, material: Mapping[str, Any], upstream: Mapping[str, str]) -> str:
    """The key of a stage: its name and material, the keys of the stages it reads, and the environment.

    Raises:
        GsrqError: the material is not plain data, so that a key of it would not be stable.
    """
    whole = {"stage": name, "material": material, "upstream": dict(upstream), "environment": environment()}
    try:
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GsrqError(f"stage {name}: its key material is not plain data: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()

"""What the exports for other hosts have in common: a description of the coded cache, and files that appear together."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gsrq_export.artifact.manifest import Manifest
from gsrq_export.errors import GsrqError
from gsrq_export.export.model import CODEBOOKS_FILE


def check_out(out: Path) -> None:
    """Raise the GsrqError of a place that holds files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GsrqError(f"--out {out} exists and is not an empty directory", "name another place")


def describe(artifact: Path, manifest: Manifest, **more: Any) -> str:
    """JSON: the artifact, its hashes, the cache rule, widths and stages of every layer, and more."""
    description = {
        "quantization": "gsrq",
        "artifact": str(artifact),
        "codebooks_sha256": manifest.files[CODEBOOKS_FILE].sha256,
        "model": {"id": manifest.model.id, "weights_sha256": manifest.model.weights_sha256},
        "cache": manifest.cache.model_dump(mode="json"),
        "layers": [layer.model_dump(mode="json") for layer in manifest.layers],
        **more,
    }
    return json.dumps(description, indent=1) + "\n"


def write_together(out: Path, files: dict[str, str]) -> None:
    """Write text files into ``out``, all or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        building.chmod(0o755)
        for name, text in files.items():
            (building / name).write_text(text, "utf-8")
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)

"""What TensorRT-LLM's AutoDeploy needs to serve an artifact's model with its coded cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.autodeploy.descriptor import BACKEND
from gsrq_export.errors import GsrqError
from gsrq_export.export.model import CODEBOOKS_FILE
from gsrq_export.hosting.layers import artifact_layers, refuse_rope

CONFIG, QUANTIZATION, LAUNCHER = "autodeploy.yaml", "quantization.json", "launch.py"
SCRIPT = '''"""Answers prompts with the model of {name}, its cache coded. Needs tensorrt_llm, gsrq-export and one GPU.

python launch.py "a prompt" ...
"""

import os
import sys
from pathlib import Path

import yaml

os.environ["TLLM_WORKER_USE_SINGLE_PROCESS"] = "1"  # the backend is registered in this process

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    from gsrq_export.autodeploy import register

    register({artifact!r})
    from tensorrt_llm._torch.auto_deploy import LLM

    settings = yaml.safe_load((Path(__file__).parent / {config!r}).read_text())
    for output in LLM(**settings).generate(sys.argv[1:]):
        print(output.outputs[0].text)
'''


def export_trtllm(artifact: Path, out: Path, max_batch_size: int = 8) -> None:
    """Write ``out``: the settings of AutoDeploy, the description of the coded cache, and a script that starts both.

    Args:
        artifact: which stays where it is: the files refer to it.
        out: must not exist, or be empty.
        max_batch_size: sequences at a time; each has a slot for the artifact's longest text.
    Raises:
        ArtifactError: the artifact is not sound.
        GsrqError: its model cannot be served so, or ``out`` holds files.
    """
    artifact = artifact.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GsrqError(f"--out {out} exists and is not an empty directory", "name another place")
    found, manifest = artifact_layers(artifact), load_manifest(artifact)
    refuse_rope(artifact)
    model = manifest.model.id
    settings: dict[str, Any] = {
        "model": model,
        "tokenizer": str(artifact / "tokenizer"),
        "world_size": 1,
        "max_seq_len": found.metadata.max_length,
        "max_batch_size": max_batch_size,
        "enable_chunked_prefill": False,
        "kv_cache_config": {"enable_block_reuse": False},
        "transforms": {"insert_cached_attention": {"backend": BACKEND}},
    }
    slot = found.metadata.row_bytes(found.metadata.max_length)
    description = {
        "quantization": "gsrq",
        "artifact": str(artifact),
        "codebooks_sha256": manifest.files[CODEBOOKS_FILE].sha256,
        "model": {"id": model, "weights_sha256": manifest.model.weights_sha256},
        "cache": manifest.cache.model_dump(mode="json"),
        "layers": [layer.model_dump(mode="json") for layer in manifest.layers],
        "slot_bytes": slot,
        "cache_bytes": slot * max_batch_size,
    }
    script = SCRIPT.format(name=manifest.name, artifact=str(artifact), config=CONFIG)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        building.chmod(0o755)
        (building / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        (building / QUANTIZATION).write_text(json.dumps(description, indent=1) + "\n", "utf-8")
        (building / LAUNCHER).write_text(script, "utf-8")
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)

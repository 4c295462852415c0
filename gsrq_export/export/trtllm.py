"""What TensorRT-LLM's AutoDeploy needs to serve an artifact's model with its coded cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.autodeploy.descriptor import BACKEND
from gsrq_export.export.host_files import check_out, describe, write_together
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
    check_out(out)
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
    description = describe(artifact, manifest, slot_bytes=slot, cache_bytes=slot * max_batch_size)
    script = SCRIPT.format(name=manifest.name, artifact=str(artifact), config=CONFIG)
    files = {CONFIG: yaml.safe_dump(settings, sort_keys=False), QUANTIZATION: description, LAUNCHER: script}
    write_together(out, files)

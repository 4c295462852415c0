"""What vLLM needs to serve an artifact's model with its coded cache."""

from __future__ import annotations

import shlex
from pathlib import Path

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.export.host_files import check_out, describe, write_together
from gsrq_export.hosting.layers import artifact_layers, refuse_rope
from gsrq_export.vllm.served import ENVIRONMENT, Served

DESCRIPTION, LAUNCHER = "quantization.json", "serve.sh"
PAGE_TOKENS = 64
SCRIPT = """#!/bin/sh
# Serves the model of {name}, its cache coded. Needs vllm, gsrq-export and one GPU; further arguments go to vLLM.
{environment}={artifact} exec vllm serve {arguments} "$@"
"""


def export_vllm(artifact: Path, out: Path) -> None:
    """Write ``out``: the description of the coded cache, and a script that starts vLLM on it.

    Args:
        artifact: which stays where it is: the files refer to it.
        out: must not exist, or be empty.
    Raises:
        ArtifactError: the artifact is not sound.
        GsrqError: its model cannot be served so, or ``out`` holds files.
    """
    artifact = artifact.resolve()
    check_out(out)
    served, manifest = Served(artifact, artifact_layers(artifact)), load_manifest(artifact)
    refuse_rope(artifact)
    metadata = served.layers.metadata
    page = -(-PAGE_TOKENS // served.block_multiple) * served.block_multiple
    arguments = [manifest.model.id, "--attention-backend", "CUSTOM", "--block-size", str(page)]
    arguments += ["--max-model-len", str(metadata.max_length), "--tokenizer", str(artifact / "tokenizer")]
    arguments += ["--no-enable-prefix-caching"]
    if metadata.exact_prefill:  # a prompt goes in one call
        arguments += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(metadata.max_length)]
    pages = served.pages(metadata.max_length, page)
    description = describe(
        artifact,
        manifest,
        page_tokens=page,
        exact_pages=served.exact_pages(page),
        sequence_bytes=pages * page * served.token_bytes * len(metadata.layers),
    )
    script = SCRIPT.format(
        name=manifest.name,
        environment=ENVIRONMENT,
        artifact=shlex.quote(str(artifact)),
        arguments=shlex.join(arguments),
    )
    write_together(out, {DESCRIPTION: description, LAUNCHER: script})

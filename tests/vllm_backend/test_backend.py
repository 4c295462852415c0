"""The backend on an artifact: a whole model through it, its registration, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from artifact.test_artifact import sound, write  # noqa: F401
from click.testing import CliRunner
from tiny_artifact import MAX_LENGTH, tiny_artifact
from vllm_backend import interface

interface.install()

from gsrq_export.cache.torch_cache import coded  # noqa: E402
from gsrq_export.commands.app import cli  # noqa: E402
from gsrq_export.errors import GsrqError  # noqa: E402
from gsrq_export.export.vllm import DESCRIPTION, LAUNCHER, export_vllm  # noqa: E402
from gsrq_export.hosting.layers import artifact_layers  # noqa: E402
from gsrq_export.model.intercept import AttentionCall, intercept  # noqa: E402
from gsrq_export.vllm import BACKEND, ENVIRONMENT, REGISTRY, register  # noqa: E402
from gsrq_export.vllm.backend import GsrqBackend, GsrqImpl  # noqa: E402
from gsrq_export.vllm.served import served_artifact  # noqa: E402


@pytest.fixture(scope="module")
def artifact(sound: Path) -> Path:  # noqa: F811
    tiny_artifact().model.config.save_pretrained(sound / "tokenizer")
    write(sound)
    return sound


@pytest.fixture(autouse=True)
def _environment(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(ENVIRONMENT, str(artifact))
    yield
    importlib.import_module(REGISTRY).AttentionBackendEnum.CUSTOM.clear_override()


def names() -> list[str]:
    return [f"model.layers.{layer.shape.layer_idx}.self_attn.attn" for layer in served_artifact().layers.layers]


def implementation(**changes: Any) -> GsrqImpl:
    config, layer = tiny_artifact().model.config, served_artifact().layers.layers[0]
    given = {
        "num_heads": config.num_attention_heads,
        "head_size": layer.shape.head_dim,
        "scale": layer.config.scale,
        "num_kv_heads": layer.shape.num_kv_heads,
        **changes,
    }
    return GsrqImpl(**given)


def specification(page: int = 16) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    shape = served_artifact().layers.layers[0].shape
    return GsrqBackend.customize_spec(
        FullAttentionSpec(
            block_size=page,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_dim,
            head_size_v=shape.head_dim,
            dtype=torch.bfloat16,
        )
    )


def builder_of(implementations: dict[str, GsrqImpl], longest: int = MAX_LENGTH, **changes: Any) -> Any:
    config = interface.config_of(implementations, longest, **changes)
    return GsrqBackend.get_builder_cls()(specification(), list(implementations), config, torch.device("cpu"))


def test_a_model_through_the_backend_is_the_coded_model() -> None:
    """Two sequences of one length, prefilled in two chunks and decoded."""
    made = tiny_artifact()
    layers = {name: implementation() for name in names()}
    builder, spec = builder_of(layers), specification()
    scheduler = interface.Scheduler(spec, 1 + 2 * spec.pages(MAX_LENGTH))
    pools = [scheduler.pool() for _ in layers]
    index = {layer.shape.layer_idx: i for i, layer in enumerate(served_artifact().layers.layers)}
    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    metadata: list[Any] = []

    def attend(call: AttentionCall) -> torch.Tensor:
        query, key = call.rotary.function(call.query, call.key, call.rotary.cos, call.rotary.sin)
        batch, _, steps, head_dim = query.shape
        flat = [x.transpose(1, 2).reshape(batch * steps, -1, head_dim) for x in (query, key, call.value)]
        i = index[call.layer_idx]
        impl = layers[names()[i]]
        found = impl.forward(None, *flat, pools[i], metadata[-1], torch.empty_like(flat[0]))
        return found.view(batch, steps, *found.shape[1:])

    with torch.no_grad():
        with coded(made.model, made.codebooks, made.rule, exact_dtype=torch.float32):
            expected = made.model(ids).logits
        logits, done = [], 0
        with intercept(made.model, attend):
            for part in [ids[:, :23], ids[:, 23:41], *ids[:, 41:].split(1, 1)]:
                new = part.shape[1]
                metadata.append(builder.build(0, scheduler.step([("a", new), ("b", new)])))
                positions = torch.arange(done, done + new).expand(2, -1)
                logits.append(made.model(part, position_ids=positions, use_cache=False).logits)
                done += new
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-3, rtol=2e-3)


def test_what_the_backend_says_of_itself() -> None:
    served, spec = served_artifact(), specification()
    assert GsrqBackend.get_name() == "CUSTOM", "vLLM looks the name up among its backends"
    assert GsrqBackend.get_supported_head_sizes() == [32]
    assert [size.base for size in GsrqBackend.get_supported_kernel_block_sizes()] == [16]
    shape = served.layers.layers[0].shape
    assert spec.page_size_bytes == spec.block_size * (shape.key_bytes + shape.value_bytes)
    room = spec.exact_pages * spec.page_size_bytes
    assert 0 <= room - served.exact_bytes(shape) < spec.page_size_bytes
    output = torch.full((3, 4, 32), 7.0)
    impl = implementation()
    assert not impl.forward(None, output, output, output, torch.empty(0), None, output).any(), "memory is measured"
    with pytest.raises(GsrqError, match="before its metadata was built"):
        impl.forward(None, output, output, output, torch.empty(0), types.SimpleNamespace(batches=[]), output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.5}, r"layer model.layers.0.self_attn.attn of the served model has scale 0.5, not"),
        ({"num_kv_heads": 1}, "1 KV heads of 32, not 2 of 32"),
        ({"sliding_window": 16}, "sliding_window 16, not None"),
        ({"logits_soft_cap": 30.0}, "logit_cap 30.0, not None"),
        ({"alibi_slopes": [1.0]}, "attention has alibi_slopes"),
        ({"attn_type": "encoder"}, "attention of type encoder"),
        ({"kv_sharing_target_layer_name": "other"}, "a cache shared between layers"),
        ({"sinks": torch.zeros(4)}, "attention has sinks"),
    ],
)
def test_attention_that_is_not_the_artifacts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GsrqError, match=message):
        builder_of({name: implementation(**changes) for name in names()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix": True}, "prefix caching is on"),
        ({"speculative": object()}, "vLLM speculates"),
        ({"longest": MAX_LENGTH + 1}, "max_model_len is 151, the artifact's longest text 150"),
    ],
)
def test_settings_that_the_cache_cannot_keep_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GsrqError, match=message):
        builder_of({name: implementation() for name in names()}, **changes)


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.attn", "attn", "blocks.0.attn.1"])
def test_layers_that_the_artifact_has_not_are_refused(name: str) -> None:
    with pytest.raises(GsrqError, match=r"is none of the artifact's layers \[0, 1\]"):
        builder_of({name: implementation()})


def test_registered_by_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    place, function = project["project"]["entry-points"]["vllm.general_plugins"]["gsrq"].split(":")
    assert getattr(importlib.import_module(place), function) is register
    registry = importlib.import_module(REGISTRY)
    custom = registry.AttentionBackendEnum.CUSTOM
    monkeypatch.delenv(ENVIRONMENT)
    register()
    assert not custom.is_overridden(), "without an artifact the plugin does nothing"
    with pytest.raises(GsrqError, match="GSRQ_ARTIFACT is not set"):
        served_artifact()


def test_registered_where_an_artifact_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module(REGISTRY)
    custom = registry.AttentionBackendEnum.CUSTOM
    for _ in range(2):  # vLLM may call it again
        register()
        assert custom.get_path() == BACKEND
    module, _, name = BACKEND.rpartition(".")
    assert getattr(importlib.import_module(module), name) is GsrqBackend
    registry.register_backend(custom, "another.Backend")
    with pytest.raises(GsrqError, match=r"backend is another.Backend already"):
        register()
    monkeypatch.setenv(ENVIRONMENT, "/nowhere")
    custom.clear_override()
    with pytest.raises(GsrqError, match="/nowhere"):
        register()
    assert not custom.is_overridden()


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        changed.delattr(importlib.import_module(REGISTRY), "register_backend")
        with pytest.raises(GsrqError, match=r"another interface: .*registry has no register_backend"):
            register()
    backend = importlib.import_module("vllm.v1.attention.backend")
    with monkeypatch.context() as changed:
        changed.delattr(backend.AttentionBackend, "customize_spec")
        with pytest.raises(GsrqError, match="its backends have no customize_spec"):
            register()
    with monkeypatch.context() as changed:
        changed.setitem(sys.modules, REGISTRY, None)
        with pytest.raises(GsrqError, match="registry cannot be imported"):
            register()


def test_rope_that_cannot_be_turned_back_is_refused(artifact: Path) -> None:
    path = artifact / "tokenizer/config.json"
    before = path.read_text()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    path.write_text(json.dumps({**json.loads(before), "rope_parameters": rope}))
    from gsrq_export.vllm.served import _served

    for cached in (artifact_layers, _served):
        cached.cache_clear()
    write(artifact)
    try:
        with pytest.raises(GsrqError, match="RoPE scaling 'dynamic': its tables change"):
            served_artifact()
    finally:
        path.write_text(before)
        write(artifact)


def test_export(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    result = CliRunner().invoke(cli, ["export", "vllm", "--artifact", str(artifact), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    assert f"bash {out / LAUNCHER}" in result.output
    described, spec = json.loads((out / DESCRIPTION).read_text()), specification(64)
    assert (described["page_tokens"], described["exact_pages"]) == (spec.block_size, spec.exact_pages)
    longest = spec.max_memory_usage_bytes(interface.config_of({}, MAX_LENGTH))
    assert described["sequence_bytes"] == 2 * longest, "of both layers"
    assert described["artifact"] == str(artifact.resolve())
    with pytest.raises(GsrqError, match="is not an empty directory"):
        export_vllm(artifact, out)
    program = tmp_path / "vllm"  # in the place of vLLM's, to see what it is given
    program.write_text('#!/bin/sh\necho "$GSRQ_ARTIFACT" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", str(out / LAUNCHER), "--port", "8001"], capture_output=True, text=True, env=environment
    )
    words = ran.stdout.split()
    assert words[:3] == [str(artifact.resolve()), "serve", described["model"]["id"]]
    assert " ".join(words[-2:]) == "--port 8001"
    for option, value in (("--attention-backend", "CUSTOM"), ("--max-model-len", "150"), ("--block-size", "64")):
        assert words[words.index(option) + 1] == value
    assert "--no-enable-prefix-caching" in words

"""The AutoDeploy descriptor on an artifact: what it asks for, a whole model through it, and what it refuses."""

from __future__ import annotations

import json
import operator
import runpy
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from artifact.test_artifact import sound, write  # noqa: F401
from autodeploy import interface
from click.testing import CliRunner
from tiny_artifact import tiny_artifact

from gsrq_export import autodeploy
from gsrq_export.autodeploy import attention
from gsrq_export.autodeploy.descriptor import INTERFACE, make_descriptor
from gsrq_export.cache.rule import CacheRule
from gsrq_export.cache.torch_cache import coded
from gsrq_export.commands.app import cli
from gsrq_export.errors import GsrqError
from gsrq_export.export.trtllm import CONFIG, LAUNCHER, QUANTIZATION, export_trtllm
from gsrq_export.hosting import layers
from gsrq_export.hosting.layers import artifact_layers
from gsrq_export.model.intercept import AttentionCall, intercept

INFO = interface.SequenceInfo(max_num_state_slots=3, max_seq_len=150)


@pytest.fixture(scope="module")
def artifact(sound: Path) -> Path:  # noqa: F811
    tiny_artifact().model.config.save_pretrained(sound / "tokenizer")
    write(sound)
    return sound


def layers_of(artifact: Path) -> list[Any]:
    return list(artifact_layers(artifact.resolve()).layers)


def source_graph(artifact: Path, **changes: Any) -> torch.fx.GraphModule:
    """All layers' attention, as AutoDeploy's graph has it: inputs query_i, key_i, value_i, rotated."""
    graph, outputs = torch.fx.Graph(), []
    heads = tiny_artifact().model.config.num_attention_heads
    layers = layers_of(artifact)
    inputs = []
    for i, layer in enumerate(layers):
        qkv = [graph.placeholder(f"{name}_{i}") for name in ("query", "key", "value")]
        counts = (heads, layer.shape.num_kv_heads, layer.shape.num_kv_heads)
        for node, count in zip(qkv, counts, strict=True):
            node.meta["val"] = torch.empty(2, 8, changes.get("kv_heads", count), layer.shape.head_dim, device="meta")
        inputs.append(qkv)
    for layer, qkv in zip(layers, inputs, strict=True):
        given = {"scale": layer.config.scale, "is_causal": True, "layout": "bsnd", **changes}
        given.pop("kv_heads", None)
        outputs.append(graph.call_function(torch.ops.auto_deploy.torch_attention.default, tuple(qkv), given))
    graph.output(tuple(outputs))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_a_model_through_the_descriptor_is_the_coded_model(artifact: Path) -> None:
    """Two sequences in slots 2 and 0, prefilled and decoded, each layer by its node of the replaced graph."""
    made = tiny_artifact()
    model = made.model
    descriptor = make_descriptor(interface.module(), artifact.resolve())
    assert (descriptor.get_attention_layout(), descriptor.get_num_qkv_args()) == ("bsnd", 3)
    replaced = source_graph(artifact)
    caches = interface.insert_cached_attention(replaced, descriptor, INFO)
    sizes = {name: (tuple(c.shape), c.dtype) for name, c in caches.items()}
    shape, slots = layers_of(artifact)[0].shape, made.rule.exact_slots
    assert sizes["key_codes_0"] == ((3, 150, shape.key_bytes), torch.int8)
    assert sizes["value_codes_1"] == ((3, 150, shape.value_bytes), torch.int8)
    assert sizes["key_exact_1"] == ((3, shape.num_kv_heads, slots, shape.head_dim), torch.float32)
    nodes = [n for n in replaced.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    assert [n.target for n in nodes] == [torch.ops.gsrq.slot_attention.default] * 2
    assert [n.args[-2:] for n in nodes] == [(str(artifact.resolve()), 0), (str(artifact.resolve()), 1)]

    ids = torch.randint(3, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    past = torch.zeros(2, dtype=torch.int32)

    def attend(call: AttentionCall) -> torch.Tensor:
        query, key = call.rotary.function(call.query, call.key, call.rotary.cos, call.rotary.sin)
        flat = [x.transpose(1, 2).contiguous() for x in (query, key, call.value)]
        batch, steps = flat[0].shape[:2]
        info = [0, 0, batch] if steps == 1 else [batch, batch * steps, 0]
        if steps > 1:
            flat = [x.reshape(1, batch * steps, *x.shape[2:]) for x in flat]
        i = spec_index[call.layer_idx]
        node = nodes[i]
        metadata = [
            torch.tensor(info, dtype=torch.int32),
            torch.full((batch,), steps, dtype=torch.int32),
            past,
            torch.tensor([2, 0], dtype=torch.int32),
            torch.arange(batch + 1, dtype=torch.int32) * steps,
        ]
        own = [caches[f"{name}_{i}"] for name in ("key_codes", "value_codes", "key_exact", "value_exact")]
        found: torch.Tensor = node.target(*flat, *metadata, *own, *node.args[-2:])
        return found.reshape(batch, steps, *found.shape[2:])

    spec_index = {layer.shape.layer_idx: i for i, layer in enumerate(layers_of(artifact))}
    with torch.no_grad():
        with coded(model, made.codebooks, made.rule, exact_dtype=torch.float32):
            expected = model(ids).logits
        logits = []
        with intercept(model, attend):
            for part in [ids[:, :41], *ids[:, 41:].split(1, 1)]:
                positions = past[:, None].long() + torch.arange(part.shape[1])
                logits.append(model(part, position_ids=positions, use_cache=False).logits)
                past += part.shape[1]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-3, rtol=2e-3)


def test_the_replaced_graph_runs_whole(artifact: Path) -> None:
    """The graph as inserted, inputs by name."""
    replaced = source_graph(artifact)
    caches = interface.insert_cached_attention(replaced, make_descriptor(interface.module(), artifact), INFO)
    generator = torch.Generator().manual_seed(0)
    given: dict[str, torch.Tensor] = {
        "batch_info_host": torch.tensor([1, 9, 0], dtype=torch.int32),
        "seq_len": torch.tensor([9], dtype=torch.int32),
        "input_pos": torch.tensor([0], dtype=torch.int32),
        "slot_idx": torch.tensor([1], dtype=torch.int32),
        "cu_seqlen": torch.tensor([0, 9], dtype=torch.int32),
        **caches,
    }
    heads = tiny_artifact().model.config.num_attention_heads
    for i, layer in enumerate(layers_of(artifact)):
        for name, count in (("query", heads), ("key", layer.shape.num_kv_heads), ("value", layer.shape.num_kv_heads)):
            given[f"{name}_{i}"] = torch.randn(1, 9, count, layer.shape.head_dim, generator=generator)
    names = [n.target for n in replaced.graph.nodes if n.op == "placeholder"]
    outputs = replaced(*(given[name] for name in names))
    for i, output in enumerate(outputs):
        assert output.shape == given[f"query_{i}"].shape
        assert bool(torch.isfinite(output).all())
        # The first token sees itself alone.
        group = output.shape[2] // given[f"value_{i}"].shape[2]
        torch.testing.assert_close(output[0, 0], given[f"value_{i}"][0, 0].repeat_interleave(group, 0))


@pytest.mark.parametrize("by_head", [False, True])
def test_slots_of_tiles_have_codes_by_head(artifact: Path, monkeypatch: pytest.MonkeyPatch, by_head: bool) -> None:
    """The order follows the slot's tokens, whatever the artifact's is."""
    found = artifact_layers(artifact.resolve())
    rule = CacheRule(2, 8, 8)
    layer = replace(found.layers[0], config=replace(found.layers[0].config, rule=rule, codes_by_head=by_head))
    changed = replace(found, metadata=replace(found.metadata, rule=rule), layers=(layer, layer))
    monkeypatch.setattr(layers, "artifact_layers", lambda _: changed)
    monkeypatch.setattr(attention, "torch_layer", layers.torch_layer.__wrapped__)
    seen: list[Any] = []
    monkeypatch.setattr(attention, "attend_slots", lambda layer, *_: seen.append(layer) or torch.zeros(0))
    shape = found.layers[0].shape
    tokens = torch.zeros(1, 1, tiny_artifact().model.config.num_attention_heads, shape.head_dim)
    for rows in (144, 150):
        codes = torch.zeros(3, rows, 1, dtype=torch.int8)
        none = [torch.zeros(1) for _ in range(5)]
        exact = [torch.zeros(1) for _ in range(2)]
        torch.ops.gsrq.slot_attention(
            tokens, tokens.clone(), tokens.clone(), *none, codes, codes.clone(), *exact, str(artifact), 0
        )
    assert [layer.config.codes_by_head for layer in seen] == [True, False]


def test_the_operator_is_what_it_declares(artifact: Path) -> None:
    """Its schema says what it mutates, its fake kernel what it returns."""
    shape = layers_of(artifact)[0].shape
    heads = tiny_artifact().model.config.num_attention_heads
    counts = (heads, shape.num_kv_heads, shape.num_kv_heads)
    exact = (shape.num_kv_heads, tiny_artifact().rule.exact_slots, shape.head_dim)
    arguments = (
        *(torch.randn(2, 1, count, shape.head_dim) for count in counts),
        *(torch.tensor(given, dtype=torch.int32) for given in ([0, 0, 2], [1, 1], [0, 5], [2, 0], [0, 1])),
        *(torch.zeros(3, 150, size, dtype=torch.int8) for size in (shape.key_bytes, shape.value_bytes)),
        *(torch.randn(3, *exact) for _ in range(2)),
    )
    checks = ("test_schema", "test_faketensor")
    found = torch.library.opcheck(
        torch.ops.gsrq.slot_attention, (*arguments, str(artifact.resolve()), 0), test_utils=checks
    )
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.5}, "layer 0 of the served model has scale 0.5, not"),
        ({"sliding_window": 16}, "sliding_window 16, not None"),
        ({"logit_cap": 30.0}, "logit_cap 30.0, not None"),
        ({"kv_heads": 1}, "1 KV heads of 32, not 2 of 32"),
        ({"layout": "bnsd"}, "attention of layout 'bnsd'"),
    ],
)
def test_attention_that_is_not_the_artifacts_is_refused(artifact: Path, changes: dict[str, Any], message: str) -> None:
    descriptor = make_descriptor(interface.module(), artifact)
    with pytest.raises(GsrqError, match=message):
        interface.insert_cached_attention(source_graph(artifact, **changes), descriptor, INFO)


def test_another_interface_is_refused(artifact: Path) -> None:
    other = interface.module()
    del other.UnpagedResourceHandler
    with pytest.raises(GsrqError, match="another AutoDeploy interface: it has no UnpagedResourceHandler"):
        make_descriptor(other, artifact)
    newer = interface.module()

    class More(interface.AttentionDescriptor):
        get_more = classmethod(abstract(lambda cls: None))

    newer.AttentionDescriptor = More
    with pytest.raises(GsrqError, match="must also have get_more"):
        make_descriptor(newer, artifact)


def abstract(function: Any) -> Any:
    function.__isabstractmethod__ = True
    return function


def test_without_tensorrt_llm_the_error_says_so(artifact: Path) -> None:
    with pytest.raises(GsrqError, match="AutoDeploy cannot be imported"):
        autodeploy.register(artifact)


def test_registered_by_name(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = interface.module()
    parts = INTERFACE.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, INTERFACE, made)
    descriptor = autodeploy.register(artifact)
    assert made.AttentionRegistry.found == {"gsrq": descriptor}
    with pytest.raises(GsrqError, match="backend 'gsrq' already"):
        autodeploy.register(artifact)


def test_export(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    result = CliRunner().invoke(cli, ["export", "trtllm", "--artifact", str(artifact), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    assert f"python {out / LAUNCHER}" in result.output
    settings = yaml.safe_load((out / CONFIG).read_text())
    assert settings["transforms"] == {"insert_cached_attention": {"backend": "gsrq"}}
    assert (settings["world_size"], settings["max_seq_len"]) == (1, 150)
    assert settings["kv_cache_config"] == {"enable_block_reuse": False}
    described = json.loads((out / QUANTIZATION).read_text())
    caches = interface.insert_cached_attention(
        source_graph(artifact),
        make_descriptor(interface.module(), artifact),
        interface.SequenceInfo(max_num_state_slots=8, max_seq_len=150),
    )
    exact = sum(c.nbytes for name, c in caches.items() if "exact" in name)
    codes = sum(c.nbytes for name, c in caches.items() if "codes" in name)
    assert described["cache_bytes"] == exact + codes
    assert described["artifact"] == str(artifact.resolve())
    bare = subprocess.run([sys.executable, str(out / LAUNCHER)], capture_output=True, text=True)
    assert bare.returncode == 1
    assert "Answers prompts with the model of tiny" in bare.stderr
    script = runpy.run_path(str(out / LAUNCHER), run_name="read")  # its imports wait for __main__
    assert script["os"].environ.pop("TLLM_WORKER_USE_SINGLE_PROCESS") == "1"
    with pytest.raises(GsrqError, match="is not an empty directory"):
        export_trtllm(artifact, out)


def test_rope_that_cannot_be_turned_back_is_refused(artifact: Path, tmp_path: Path) -> None:
    config = json.loads((artifact / "tokenizer/config.json").read_text())
    before = json.dumps(config)
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (artifact / "tokenizer/config.json").write_text(json.dumps(config))
    write(artifact)
    artifact_layers.cache_clear()
    try:
        with pytest.raises(GsrqError, match="RoPE scaling 'dynamic': its tables change"):
            export_trtllm(artifact, tmp_path / "out")
    finally:
        (artifact / "tokenizer/config.json").write_text(before)
        write(artifact)
    assert not (tmp_path / "out").exists()

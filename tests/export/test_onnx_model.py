"""Exported decoders, run by stock ONNX Runtime, against the same model in torch with the operator's oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from families import FAMILIES, tiny_model

from gsrq_export.cache.reference import LayerCache, gsrq_attention
from gsrq_export.cache.rule import CacheRule
from gsrq_export.codec.codebook import Codebook, LayerCodebooks
from gsrq_export.codec.storage import load_codebooks
from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.export.model import export_onnx
from gsrq_export.export.trace import CACHE_PARTS, ExportSettings
from gsrq_export.model.intercept import AttentionCall, intercept
from gsrq_export.model.introspect import ModelSpec, inspect_model

RULE = CacheRule(2, 5, 4)


def codebooks(spec: ModelSpec, rotated: bool = False) -> list[LayerCodebooks]:
    """Keys of all heads together, values half a head at a time; rougher than trained ones."""
    made = []
    for layer in spec.layers:
        generator = torch.Generator().manual_seed(layer.index)

        def book(width: int, stages: int, count: int, generator: torch.Generator = generator) -> Codebook:
            words = (
                torch.randn(count, stages, 256, width, generator=generator) * 0.8 ** torch.arange(stages)[:, None, None]
            )
            return Codebook(words.half(), torch.eye(width).repeat(count, 1, 1))

        elements, half = layer.num_kv_heads * layer.head_dim, layer.head_dim // 2
        center = torch.randn(elements, generator=generator) if rotated else None
        keys = replace(book(elements, 3, 1), center=center)
        made.append(LayerCodebooks(keys, book(half, 2, elements // half)))
    return made


@dataclass
class Exported:
    """A model, its export, and both ways to run a step."""

    family: str
    directory: Path
    settings: ExportSettings
    changes: dict[str, object] = field(default_factory=dict)  # of the model's configuration
    rotated: bool = False

    def __post_init__(self) -> None:
        layers = 4 if self.family == "Gemma2" else 2  # sliding and full layers take turns
        self.model = tiny_model(self.family, num_hidden_layers=layers, **self.changes)
        self.spec = inspect_model(self.model, 128)
        self.codebooks = codebooks(self.spec, self.rotated)
        self.path = export_onnx(self.model, self.spec, self.codebooks, self.settings, self.directory)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(self.path, options, ["CPUExecutionProvider"])

    def empty(self, batch: int, capacity: int) -> list[LayerCache]:
        return [
            LayerCache.empty(
                batch, capacity, s.num_kv_heads, s.head_dim, b.keys, b.values, RULE, self.settings.exact_dtype
            )
            for s, b in zip(self.spec.layers, self.codebooks, strict=True)
        ]

    def run_onnx(
        self, ids: torch.Tensor, past: torch.Tensor, new: torch.Tensor, at: torch.Tensor, caches: list[LayerCache]
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        feed = {"input_ids": ids, "past_lengths": past, "new_lengths": new, "logit_indices": at}
        feed |= {f"past.{i}.{part}": getattr(c, part) for i, c in enumerate(caches) for part in CACHE_PARTS}
        logits, *present = self.session.run(None, {k: v.numpy() for k, v in feed.items()})
        tensors = [torch.from_numpy(x) for x in present]
        return torch.from_numpy(logits), [LayerCache(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]

    @torch.no_grad()
    def run_oracle(
        self, ids: torch.Tensor, past: torch.Tensor, new: torch.Tensor, at: torch.Tensor, caches: list[LayerCache]
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        after = list(caches)

        def attend(call: AttentionCall) -> torch.Tensor:
            layer = self.spec.layer(call.layer_idx)
            books = self.codebooks[layer.index]
            output, after[layer.index] = gsrq_attention(
                *(call.query, call.key, call.value),
                *self.spec.rope_tables[layer.rope_table],
                *(past, new, caches[layer.index], books.keys, books.values),
                self.settings.attention(layer),
            )
            return output

        with intercept(self.model, attend):
            positions = past[:, None] + torch.arange(ids.shape[1])
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1])), after


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def get(family: str) -> Exported:
        if family not in made:
            # Both kinds of prefill, both types of exact buffers and a beam are met by some family.
            n = list(FAMILIES).index(family)
            dtype = torch.float32 if n % 3 == 2 else torch.float16
            settings = ExportSettings(RULE, beam=1 + n % 2, exact_prefill=n % 4 == 3, exact_dtype=dtype)
            made[family] = Exported(family, tmp_path_factory.mktemp(family), settings)
        return made[family]

    return get


def test_equals_the_oracle(export: Callable[[str], Exported], family: str) -> None:
    """Ragged prefill, a second ragged chunk, then single tokens of which one row has none."""
    e = export(family)
    random = torch.Generator().manual_seed(5)
    past, caches = torch.zeros(3, dtype=torch.int64), e.empty(3, 48)
    for lengths in ([23, 9, 17], [1, 12, 5], *[[1, 1, 1], [1, 0, 1]] * 4):
        new = torch.tensor(lengths)
        ids = torch.randint(0, 97, (3, max(lengths)), generator=random)
        at = (
            torch.stack([torch.clamp(new - k, min=1) - 1 for k in range(3)], 1)
            if max(lengths) > 1
            else torch.zeros(3, 1).long()
        )
        expected, after = e.run_oracle(ids, past, new, at, caches)
        logits, present = e.run_onnx(ids, past, new, at, caches)
        real = new > 0
        assert (logits - expected)[real].abs().max() <= 1e-3
        for layer, (a, b) in enumerate(zip(present, after, strict=True)):
            assert torch.equal(a.key_codes, b.key_codes), layer
            assert torch.equal(a.value_codes, b.value_codes), layer
            torch.testing.assert_close(a.key_exact, b.key_exact, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(a.value_exact, b.value_exact, atol=2e-3, rtol=2e-3)
        caches, past = present, past + new
    assert RULE.coded(past).min() > 8


@pytest.mark.parametrize(("batch", "tokens", "outputs", "capacity"), [(1, 1, 1, 0), (1, 6, 6, 4), (4, 3, 2, 100)])
def test_shapes_are_dynamic(
    export: Callable[[str], Exported], batch: int, tokens: int, outputs: int, capacity: int
) -> None:
    e = export("Qwen3")
    ids = torch.arange(batch * tokens).reshape(batch, tokens)
    past, new = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), tokens)
    at = torch.arange(outputs).expand(batch, -1) % tokens
    expected, _ = e.run_oracle(ids, past, new, at, e.empty(batch, capacity))
    logits, present = e.run_onnx(ids, past, new, at, e.empty(batch, capacity))
    assert (logits - expected).abs().max() <= 1e-3
    assert present[0].key_codes.shape == (batch, capacity, e.codebooks[0].keys.code_bytes)


def test_dynamic_rope(tmp_path: Path) -> None:
    """Its module branches on the positions, which torch.export cannot trace."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    e = Exported("Llama", tmp_path, ExportSettings(RULE), {"rope_parameters": rope})
    ids, past, new = torch.arange(30).reshape(2, 15), torch.zeros(2, dtype=torch.int64), torch.tensor([15, 11])
    at = torch.tensor([[14], [10]])
    logits, _ = e.run_onnx(ids, past, new, at, e.empty(2, 8))
    assert (logits - e.run_oracle(ids, past, new, at, e.empty(2, 8))[0]).abs().max() <= 1e-3


def test_rotated_keys(tmp_path: Path) -> None:
    e = Exported("Llama", tmp_path, ExportSettings(RULE, exact_dtype=torch.float32), rotated=True)
    ids, past, new = torch.arange(60).reshape(2, 30), torch.zeros(2, dtype=torch.int64), torch.tensor([30, 21])
    caches = e.empty(2, 40)
    for lengths in (new, torch.tensor([1, 1]), torch.tensor([9, 12])):
        width = int(lengths.max())
        at = (lengths - 1)[:, None]
        expected, after = e.run_oracle(ids[:, :width], past, lengths, at, caches)
        logits, present = e.run_onnx(ids[:, :width], past, lengths, at, caches)
        assert (logits - expected).abs().max() <= 1e-3
        assert all(torch.equal(a.key_codes, b.key_codes) for a, b in zip(present, after, strict=True))
        caches, past = present, past + lengths
    model = onnx.load(e.path, load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "GsrqAttention"]
    assert [n.input[15] for n in nodes] == [f"layers.{i}.key.center" for i in range(2)]
    mixed = [e.codebooks[0], codebooks(e.spec)[1]]
    with pytest.raises(GsrqError, match="some layers' keys are coded in the rotated frame"):
        export_onnx(e.model, e.spec, mixed, e.settings, tmp_path)


def test_signature_and_metadata(export: Callable[[str], Exported]) -> None:
    e = export("Gemma2")
    inputs = {i.name: (i.type, i.shape) for i in e.session.get_inputs()}
    outputs = {o.name: (o.type, o.shape) for o in e.session.get_outputs()}
    expected: dict[str, tuple[str, list[object]]] = {
        "input_ids": ("tensor(int64)", ["batch", "tokens"]),
        "past_lengths": ("tensor(int64)", ["batch"]),
        "new_lengths": ("tensor(int64)", ["batch"]),
        "logit_indices": ("tensor(int64)", ["batch", "outputs"]),
    }
    assert (e.settings.exact_dtype, e.settings.exact_prefill) == (torch.float32, False)
    for i in range(4):
        for side, count in (("key", 3), ("value", 8)):
            expected[f"past.{i}.{side}_codes"] = ("tensor(int8)", ["batch", "capacity", count])
            expected[f"past.{i}.{side}_exact"] = ("tensor(float)", ["batch", 2, RULE.exact_slots, 16])
    assert inputs == expected
    present = {n.replace("past", "present", 1): v for n, v in expected.items() if n.startswith("past.")}
    assert outputs == {"logits": ("tensor(float)", ["batch", "outputs", 97]), **present}

    model = onnx.load(e.path, load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    cache = json.loads(properties.pop("gsrq.cache"))
    layers = cache.pop("layers")
    assert properties == {"gsrq.op_version": "1"}
    assert cache == {
        **{"sinks": 2, "window": 5, "block": 4, "max_length": 128},
        **{"prefill": "coded", "exact_dtype": "float32"},
    }
    assert [x["layer_idx"] for x in layers] == [0, 1, 2, 3]
    assert layers[0] == {"layer_idx": 0, "num_kv_heads": 2, "head_dim": 16, "key_bytes": 3, "value_bytes": 8}
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 21), ("ai.gsrq", 1)}


def test_codebooks_are_stored_once(export: Callable[[str], Exported]) -> None:
    """The codebooks' initializers are windows onto codebooks.safetensors; the files are read back whole."""
    e = export("Llama")
    model = onnx.load(e.path, load_external_data=False)
    seen = set()
    for x in model.graph.initializer:
        where = {entry.key: entry.value for entry in x.external_data}
        if not x.name.startswith("layers."):
            assert where.get("location", "model.onnx.data") == "model.onnx.data"
            continue
        assert where["location"] == "codebooks.safetensors"
        raw = (e.directory / where["location"]).read_bytes()[int(where["offset"]) :][: int(where["length"])]
        _, layer, side, part = x.name.split(".")
        books = e.codebooks[int(layer)]
        tensor = getattr(books.keys if side == "key" else books.values, part)
        assert raw == tensor.numpy().tobytes()
        seen.add(x.name)
    assert len(seen) == 8
    assert sorted(p.name for p in e.directory.iterdir()) == ["codebooks.safetensors", "model.onnx", "model.onnx.data"]
    for a, b in zip(load_codebooks(e.directory / "codebooks.safetensors"), e.codebooks, strict=True):
        assert torch.equal(a.keys.codewords, b.keys.codewords)
        assert torch.equal(a.values.transform, b.values.transform)
    full = onnx.load(e.path)
    onnx.checker.check_model(full)
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in full.graph.initializer}
    parameter = dict(e.model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(weights["model.layers.1.mlp.down_proj.weight"], parameter.detach().numpy())


def test_tied_embeddings_are_stored_once(export: Callable[[str], Exported]) -> None:
    model = onnx.load(export("Gemma").path, load_external_data=False)
    assert [list(x.dims) for x in model.graph.initializer].count([97, 64]) == 1


def test_two_exports_are_identical(export: Callable[[str], Exported], tmp_path: Path) -> None:
    e = export("Llama")
    export_onnx(e.model, e.spec, e.codebooks, e.settings, tmp_path)
    for file in e.directory.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_refusals_write_nothing(export: Callable[[str], Exported], tmp_path: Path) -> None:
    e = export("Llama")
    with pytest.raises(GsrqError, match="codebooks for 1 layers, the model has 2"):
        export_onnx(e.model, e.spec, e.codebooks[:1], e.settings, tmp_path)
    foreign = export("Mistral").codebooks
    with pytest.raises(GsrqError, match="layer 0: the key codebook codes 32 elements, the layer's KV heads have 64"):
        export_onnx(e.model, e.spec, foreign, e.settings, tmp_path)
    with pytest.raises(GsrqError, match=r"exact_dtype torch.float64 cannot be exported"):
        export_onnx(e.model, e.spec, e.codebooks, ExportSettings(exact_dtype=torch.float64), tmp_path)
    with pytest.raises(GsrqError, match="block = 4: codes ordered by head lie in tiles of 8 tokens"):
        export_onnx(e.model, e.spec, e.codebooks, ExportSettings(RULE, codes_by_head=True), tmp_path)
    with pytest.raises(GsrqError, match=r"is torch.bfloat16 on cpu"):
        export_onnx(tiny_model("Llama").bfloat16(), e.spec, e.codebooks, e.settings, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_is_missed_is_refused(export: Callable[[str], Exported], tmp_path: Path) -> None:
    """The specification is of two layers, the model that is exported runs only one of them."""
    e = export("Llama")
    shorter = tiny_model("Llama", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\] own a cache but were not reached"):
        export_onnx(shorter, e.spec, e.codebooks, e.settings, tmp_path)
    assert list(tmp_path.iterdir()) == []

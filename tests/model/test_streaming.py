"""A model whose weights are streamed is the model: the same logits, captures and exports, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STREAMED, write_checkpoint
from safetensors.torch import load_file, save_file

from gsrq_export.capture import Captured, CaptureSettings, capture, output_projections, shards_of
from gsrq_export.errors import GsrqError, UnsupportedModelError
from gsrq_export.layerwise import capture_layerwise
from gsrq_export.model.checkpoint import Checkpoint
from gsrq_export.model.introspect import ModelSpec, inspect_model
from gsrq_export.model.loading import load_model
from gsrq_export.model.streaming import load_streamed, streamed_weights


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, ModelSpec]]:
    made: dict[str, tuple[Any, Any, ModelSpec]] = {}

    def get(family: str) -> tuple[Any, Any, ModelSpec]:
        if family not in made:
            directory = write_checkpoint(family, tmp_path_factory.mktemp(family))
            assert (directory / "model.safetensors.index.json").is_file()
            whole, streamed = (load(directory)[0] for load in (load_model, load_streamed))
            made[family] = whole, streamed, inspect_model(whole, 64)
        return made[family]

    return get


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("family", STREAMED)
def test_logits_spec_and_projections(family: str, models: Callable[[str], tuple[Any, Any, ModelSpec]]) -> None:
    whole, streamed, spec = models(family)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, streamed(input_ids=ids).logits)
    found = inspect_model(streamed, 64)
    assert found.layers == spec.layers
    for ours, theirs in zip(found.rope_tables, spec.rope_tables, strict=True):
        assert all(map(torch.equal, ours, theirs))
    projections = output_projections(streamed, spec)
    assert len(projections) == len(spec.layers)
    assert all(map(torch.equal, projections, output_projections(whole, spec)))
    assert all(p.is_meta for p in streamed.parameters())


@pytest.mark.parametrize("family", STREAMED)
def test_capture_leaves_the_same_files(
    family: str, models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path
) -> None:
    """Five sequences in shards of two, all in one wave and each shard in its own."""
    whole, streamed, spec = models(family)
    ids = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(1)).numpy()
    half = spec.layers[0].head_dim // 2
    for case, settings in {
        "gradients": CaptureSettings(half, half, batch=2, rotated_keys=True),
        "vectors": CaptureSettings(half, half, batch=2, gradients=False, vectors=50, seed=3),
    }.items():
        want, one, many = (tmp_path / case / name for name in ("whole", "one", "many"))
        for directory in (want, one, many):
            directory.mkdir(parents=True)
        capture(whole, spec, ids, settings, want)
        ticks: list[int] = []
        capture(streamed, spec, ids, settings, one, ticks.append)
        capture(streamed, spec, ids, replace(settings, scratch_bytes=0), many)
        assert ticks == [2, 2, 1]
        assert sorted(files(want)) == [f"shard-0000{i}.safetensors" for i in range(3)]
        assert files(want) == files(one) == files(many), case


def test_a_loss_in_parts_has_the_same_gradients(
    models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies of large models make the logits of a shard too many; other sums, so no longer the same bits."""
    whole, streamed, spec = models("Gemma2")
    monkeypatch.setattr("gsrq_export.layerwise.LOGIT_BYTES", 4 * 263 * 2 * 5)  # five positions at a time, of 24
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1)).numpy()
    settings = CaptureSettings(4, 4, batch=2)
    for model, name in ((whole, "whole"), (streamed, "streamed")):
        (tmp_path / name).mkdir()
        capture(model, spec, ids, settings, tmp_path / name)
    want, got = (load_file(tmp_path / name / "shard-00000.safetensors") for name in ("whole", "streamed"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6)


def test_no_more_than_a_layer_is_in_memory(
    models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed, spec = models("Llama")
    weights = streamed_weights(streamed)
    assert weights is not None
    most, fill = [0], weights._fill

    def watch(module: torch.nn.Module) -> None:
        fill(module)
        most.append(sum(p.numel() for p in streamed.parameters() if not p.is_meta))

    monkeypatch.setattr(weights, "_fill", watch)
    ids = torch.randint(0, 256, (4, 24)).numpy()
    capture(streamed, spec, ids, CaptureSettings(16, 16, batch=2), tmp_path)
    layer = sum(p.numel() for p in streamed.model.layers[0].parameters())
    assert max(most) == layer
    assert all(p.is_meta for p in streamed.parameters())


def test_an_interrupted_capture_goes_on(
    models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed, spec = models("Llama")
    ids = torch.randint(0, 256, (5, 24)).numpy()
    settings = CaptureSettings(16, 16, batch=2, scratch_bytes=0)
    for name in "ab":
        (tmp_path / name).mkdir()
    capture(streamed, spec, ids, settings, tmp_path / "a")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(streamed, spec, ids, settings, tmp_path / "b", stop)
    assert sorted(files(tmp_path / "b")) == ["shard-00000.safetensors"]  # and no leftovers
    assert all(p.is_meta for p in streamed.parameters())
    ticks: list[int] = []
    capture(streamed, spec, ids, settings, tmp_path / "b", ticks.append)
    assert ticks == [2, 2, 1]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_processes_that_capture_side_by_side_share_no_file(
    models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has shards of its own; what is written under any name but theirs would be another's too."""
    _, streamed, spec = models("Llama")
    ids = torch.randint(0, 256, (4, 24)).numpy()
    settings = CaptureSettings(16, 16, batch=2)
    written: list[set[str]] = []
    opened = Path.open

    def watch(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "w" in mode and path.parent == tmp_path:
            written[-1].add(path.name)
        return opened(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", watch)
    for shard in shards_of(ids, settings, tmp_path):
        written.append(set())
        capture_layerwise(streamed, spec, [shard], settings, lambda count: None)
    assert [len(names) for names in written] == [2, 2]
    assert not written[0] & written[1]


def test_budgeted_vectors_are_rows_of_all(models: Callable[[str], tuple[Any, Any, ModelSpec]], tmp_path: Path) -> None:
    whole, _, spec = models("Qwen3")
    ids = torch.randint(0, 256, (6, 24)).numpy()
    found = []
    for number, (vectors, seed, batch) in enumerate([(None, 0, 2), (40, 0, 2), (40, 0, 3), (40, 1, 2), (3, 0, 1)]):
        (tmp_path / str(number)).mkdir()
        settings = CaptureSettings(24, 24, batch=batch, vectors=vectors, seed=seed)
        capture(whole, spec, ids, settings, tmp_path / str(number))
        found.append(Captured(tmp_path / str(number)))
    every, some, other_shards, other_seed, few = found
    layer = spec.layers[1]
    for read in (
        lambda c: c.vectors(layer, "key"),
        lambda c: c.gradients(layer, "value"),
        lambda c: c.positions(),
    ):
        assert len(read(every)) == 144
        assert len(read(some)) == 40
        assert len(read(few)) == 3  # most shards hold none
        torch.testing.assert_close(read(some), read(other_shards), rtol=1e-4, atol=1e-6)
        assert not torch.equal(read(some), read(other_seed))
    keys = every.vectors(layer, "key")
    at = [int((keys == row).all(1).nonzero()[0]) for row in some.vectors(layer, "key")]
    assert at == sorted(set(at))
    assert some.positions().tolist() == [row % 24 for row in at]
    torch.testing.assert_close(some.query_moment(layer), every.query_moment(layer))


def test_tied_weights_are_read_from_whichever_is_stored(tmp_path: Path) -> None:
    directory = write_checkpoint("Qwen3", tmp_path)
    index = directory / "model.safetensors.index.json"
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    index.unlink()
    ids = torch.randint(0, 256, (1, 9))
    table = tensors.pop("model.embed_tokens.weight")
    other = torch.randn_like(table)
    for stored in ({"lm_head.weight": table}, {"model.embed_tokens.weight": table, "lm_head.weight": other}):
        save_file({**tensors, **stored}, directory / "model.safetensors", {"format": "pt"})
        whole, streamed = (load(directory)[0] for load in (load_model, load_streamed))
        assert torch.equal(whole(input_ids=ids).logits, streamed(input_ids=ids).logits)


def test_refusals(tmp_path: Path) -> None:
    llama = write_checkpoint("Llama", tmp_path / "llama")
    index = llama / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = llama / weight_map["model.norm.weight"]
    tensors = load_file(file)

    norm = tensors.pop("model.norm.weight")
    save_file({**tensors, "other.norm.weight": norm}, file)
    with pytest.raises(GsrqError, match=r"lack 1 tensors .* model\.norm\.weight(.|\n)*model\.streaming: never"):
        load_streamed(llama)
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, file)
    with pytest.raises(GsrqError, match=r"model\.norm\.weight has shape \[63\]"):
        load_streamed(llama)
    save_file({**tensors, "model.norm.weight": norm.to(torch.int8)}, file)
    with pytest.raises(GsrqError, match=r"model\.norm\.weight in .* is of type I8"):
        load_streamed(llama)
    file.write_bytes(b"x" * 100)
    with pytest.raises(GsrqError, match="damaged"):
        load_streamed(llama)

    experts = write_checkpoint("Mixtral", tmp_path / "mixtral", num_local_experts=2)
    with pytest.raises(UnsupportedModelError, match="put together from several tensors"):
        load_streamed(experts)


def test_a_checkpoint_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "matrix": torch.randn(37, 5).bfloat16(),
        "vector": torch.randn(11).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("gsrq_export.model.checkpoint.CHUNK_BYTES", 60)  # three rows
    checkpoint = Checkpoint(tmp_path)
    assert [len(part) for part in checkpoint.chunks("matrix")] == [3] * 12 + [1]
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor.float())
    index = torch.tensor([36, 0, 0, 7])
    assert torch.equal(checkpoint.rows("matrix", index), tensors["matrix"][index].float())
    assert checkpoint.elements == 37 * 5 + 11 + 1

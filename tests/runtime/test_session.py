"""OrtModel against the torch cache, on each way of running the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_artifact import MAX_LENGTH, RULE, TinyArtifact, tiny_artifact

from gsrq_export import GsrqError, coded, native
from gsrq_export.cache.rule import to_token_order
from gsrq_export.errors import ArtifactError
from gsrq_export.evaluate.ort_runner import OrtRunner
from gsrq_export.evaluate.torch_runner import TorchRunner
from gsrq_export.runtime.session import CUDA, OrtModel

Open = Callable[[TinyArtifact], OrtModel]


@pytest.fixture(params=["onnx-function", "cpu-op"])
def open_model(request: pytest.FixtureRequest) -> Open:
    library = native.find() if request.param == "cpu-op" else None
    if request.param == "cpu-op" and library is None:
        pytest.skip("the custom-op library is not built: gsrq plugins build")

    def open_(artifact: TinyArtifact) -> OrtModel:
        model = OrtModel(artifact.path, threads=1, library=library)
        assert model.backend == request.param
        return model

    return open_


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def in_torch(artifact: TinyArtifact) -> AbstractContextManager[torch.nn.Module]:
    return coded(
        artifact.model,
        artifact.codebooks,
        artifact.rule,
        exact_prefill=artifact.exact_prefill,
        exact_dtype=artifact.exact_dtype,
    )


@torch.no_grad()
def reference(artifact: TinyArtifact, prompt: list[int], then: list[int]) -> tuple[torch.Tensor, object]:
    """Logits after the prompt and after each later token [1 + len(then), vocab], and the cache."""
    with in_torch(artifact):
        out = artifact.model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits[0, -1]]
        for token in then:
            out = artifact.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits), out.past_key_values


def in_token_order(artifact: TinyArtifact, layer: int, part: str, codes: np.ndarray) -> np.ndarray:
    """The codes of a layer's cache as the torch cache has them."""
    books, head_dim = artifact.codebooks[layer], artifact.model.config.head_dim
    book = books.keys if part == "key_codes" else books.values
    return to_token_order(torch.from_numpy(codes), book.code_run(head_dim, artifact.codes_by_head)).numpy()


KINDS = [
    ("Llama", False, torch.float32, False),
    ("Llama", True, torch.float32, False),
    ("Qwen3", False, torch.float16, False),
    ("Qwen3", False, torch.float32, True),
]


@pytest.mark.parametrize(("family", "exact_prefill", "exact_dtype", "by_head"), KINDS)
def test_prefill_and_steps(
    open_model: Open, family: str, exact_prefill: bool, exact_dtype: torch.dtype, by_head: bool
) -> None:
    artifact = tiny_artifact(family, exact_prefill, exact_dtype, by_head)
    tight = exact_dtype == torch.float32
    model = open_model(artifact)
    prompts, then = rows(61, 1, 17, 42), rows(30, 30, 30, 30, seed=1)
    got = [model.prefill(prompts)]
    got += [model.step([row[t] for row in then]) for t in range(30)]
    assert model.lengths.tolist() == [91, 31, 47, 72]
    for b, (prompt, tokens) in enumerate(zip(prompts, then, strict=True)):
        expected, cache = reference(artifact, prompt, tokens)
        np.testing.assert_allclose(np.stack([step[b] for step in got]), expected, atol=1e-3 if tight else 2e-2)
        held = int(artifact.rule.coded(len(prompt) + 30))
        for i, layer in enumerate(cache.layers):  # type: ignore[attr-defined]
            for part in ("key_codes", "value_codes"):
                codes = in_token_order(artifact, i, part, model.read_cache(i, part))[b, :held]
                same = codes == getattr(layer.cache, part)[0, :held].numpy()
                assert same.all() if tight else same.mean() > 0.98


def test_chunks_change_nothing_when_prefill_is_coded(open_model: Open) -> None:
    model = open_model(tiny_artifact())
    prompts = rows(61, 1, 17, 42)
    whole = model.prefill(prompts)
    for chunk in (1, 7, 60, 61, 400):
        np.testing.assert_allclose(model.prefill(prompts, chunk), whole, atol=1e-3)
    exact = open_model(tiny_artifact("Llama", True))
    assert np.abs(exact.prefill(prompts, 7) - exact.prefill(prompts)).max() > 1e-2


def test_append_gives_all_logits_and_skips_rows_without_tokens(open_model: Open) -> None:
    model = open_model(tiny_artifact())
    prompts, more = rows(30, 12), rows(9, 9, seed=2)
    steps = [model.prefill(prompts)] + [model.step([a, b]) for a, b in zip(*more, strict=True)]
    model.prefill(prompts)
    np.testing.assert_allclose(model.append(more), np.stack(steps[1:], 1), atol=1e-3)

    model.prefill(prompts)
    model.append([more[0], []])
    assert model.lengths.tolist() == [39, 12]
    last = model.append([[], more[1]])
    np.testing.assert_allclose(last[1], np.stack(steps[1:], 1)[1], atol=1e-3)


def test_cache_grows_and_is_counted(open_model: Open) -> None:
    model = open_model(tiny_artifact("Qwen3", False, torch.float16))
    assert model.cache_bytes == 0
    sets = 1 if model.backend == "cpu-op" else 2
    seen = []
    model.prefill(rows(5, 3))
    for _ in range(MAX_LENGTH - 5):
        model.step([7, 8])
        seen.append(model.cache_bytes)
    capacity = model.metadata.full_capacity
    assert capacity == RULE.coded(MAX_LENGTH)
    assert seen[-1] == sets * 2 * model.metadata.row_bytes(capacity)
    # 2 layers; codes of 3 + 2 * 2 bytes a token; exact float16 keys and values of 2 heads by 24 in 14 slots.
    assert model.metadata.row_bytes(capacity) == 2 * (capacity * 7 + 2 * 14 * 48 * 2)
    assert len(set(seen)) <= 7, "capacity doubles"
    model.reset()
    assert model.cache_bytes == 0


@pytest.mark.parametrize("exact_prefill", [False, True])
def test_evaluation_runner(open_model: Open, exact_prefill: bool) -> None:
    artifact = tiny_artifact("Llama", exact_prefill)
    runner = OrtRunner(open_model(artifact))
    ids, prompts = torch.tensor(rows(47, 47)), rows(33, 33, 8, seed=4)
    with in_torch(artifact):
        same = TorchRunner(artifact.model, exact_prefill)
        for start in (1, 23, 46):
            torch.testing.assert_close(runner.nll(ids, start), same.nll(ids, start), atol=1e-3, rtol=1e-3)
        assert runner.greedy(prompts, 11) == same.greedy(prompts, 11)


def test_bad_input_is_refused_before_a_run(open_model: Open) -> None:
    model = open_model(tiny_artifact())
    prompts = rows(30, 12)
    model.prefill(prompts)
    for call, message in (
        (lambda: model.step([97, 3]), r"row 0: token 97 is outside the vocabulary 0 \.\. 96"),
        (lambda: model.step([3, -1]), "row 1: token -1"),
        (lambda: model.step([3]), "1 rows of tokens for a batch of 2"),
        (lambda: model.append([[], []]), "no row has a token"),
        (lambda: model.append([[3] * 121, [3]]), "row 0: 151 tokens exceed the artifact's max_length of 150"),
        (lambda: model.prefill([[3] * 151]), "row 0: 151 tokens exceed"),
        (lambda: model.prefill([[3], []]), "row 1 has no tokens"),
        (lambda: model.prefill([]), "0 rows of tokens"),
        (lambda: model.prefill([[3]], chunk=0), "chunk: 0 is below 1"),
    ):
        with pytest.raises(GsrqError, match=message):
            call()
    assert model.lengths.tolist() == [30, 12], "the caches are as before"
    np.testing.assert_allclose(model.step([5, 6])[0], reference(tiny_artifact(), prompts[0], [5])[0][-1], atol=1e-3)


def test_library_and_provider(tmp_path: Path) -> None:
    path = tiny_artifact().path
    found = native.find()
    assert OrtModel(path).backend == ("onnx-function" if found is None else "cpu-op")
    with pytest.raises(GsrqError, match=r"library .*none\.so does not exist"):
        OrtModel(path, library=tmp_path / "none.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(GsrqError, match=r"library .*text\.so: .*"):
        OrtModel(path, library=tmp_path / "text.so")
    with pytest.raises(GsrqError, match="provider 'Abacus' is not in this ONNX Runtime"):
        OrtModel(path, provider="Abacus")
    if CUDA not in onnxruntime.get_available_providers():
        with pytest.raises(GsrqError, match="is not in this ONNX Runtime") as error:
            OrtModel(path, provider=CUDA)
        assert "onnxruntime-gpu" in error.value.mend
    with pytest.raises(GsrqError, match="threads: 0 is below 1"):
        OrtModel(path, threads=0)


def _rewritten(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    shutil.copytree(tiny_artifact().path, tmp_path, dirs_exist_ok=True)
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return tmp_path


def _property(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    return next(entry for entry in model.metadata_props if entry.key == key)


def test_damaged_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx does not exist"):
        OrtModel(tmp_path)

    def set_cache(**values: object) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            entry = _property(model, "gsrq.cache")
            entry.value = json.dumps({**json.loads(entry.value), **values})

        return change

    def version(model: onnx.ModelProto) -> None:
        _property(model, "gsrq.op_version").value = "2"

    def one_layer_fewer(model: onnx.ModelProto) -> None:
        entry = _property(model, "gsrq.cache")
        data = json.loads(entry.value)
        entry.value = json.dumps({**data, "layers": data["layers"][:-1]})

    for i, (change, message) in enumerate(
        (
            (version, "gsrq.op_version is '2', this program runs '1'"),
            (lambda model: model.ClearField("metadata_props"), "no metadata gsrq.op_version"),
            (set_cache(max_length=10**15), "bad gsrq.cache: max_length is 1000000000000000"),
            (set_cache(block=0), "bad gsrq.cache: block is 0"),
            (set_cache(window="8"), "bad gsrq.cache: window is '8'"),
            (set_cache(prefill="maybe"), "prefill 'maybe'"),
            (set_cache(exact_dtype="int4"), "exact_dtype 'int4'"),
            (set_cache(code_order="row"), "code_order 'row'"),
            (set_cache(code_order="head"), "code_order 'head', block 4"),
            (set_cache(layers=3), "bad gsrq.cache"),
            (one_layer_fewer, r"inputs are not those of its metadata: past\.1\.key_codes"),
        )
    ):
        with pytest.raises(ArtifactError, match=message):
            OrtModel(_rewritten(tmp_path / str(i), change), library=None)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07broken")
    with pytest.raises(ArtifactError, match="gsrq verify"):
        OrtModel(tmp_path, library=None)

"""Peak memory of a build whose weights are streamed, by stage, on a random checkpoint with LLaMA-3-8B's dimensions.

    python benchmarks/large_model.py --scratch DIR      # DIR: about 50 GB free; everything written there is deleted

Writes the checkpoint (16 GB of bfloat16 in several files), runs a build's stages in a process of their own, and reads
the kernel's high-water mark of its resident memory, which is reset at the start of each stage. The process may not
have more than --limit of private memory (RLIMIT_DATA). Traffic is short and codebooks have few stages: time grows with
both, memory does not. What does decide it is a shard's number of tokens, 4096 where traffic is long enough: a second
run captures one such shard through the first two layers of the same checkpoint. Nothing is published as an artifact:
that copies 32 GB of files. Results go to benchmarks/results/large_model.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import ROOT, environment

DIMENSIONS = {  # huggingface.co/meta-llama/Meta-Llama-3-8B, config.json
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LAYERS = 32
RESULT = ROOT / "benchmarks/results/large_model.json"
HASHING = "hash of the weights"  # before the first stage
SAMPLE_SECONDS = 0.02


def config(layers: int) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return LlamaConfig(**DIMENSIONS, **tokens, num_hidden_layers=layers, rope_parameters=rope, dtype="bfloat16")


def write_checkpoint(directory: Path) -> None:
    """Random weights of unit gain, four layers a file; a tokenizer of one token a byte; a text."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from gsrq_export.model.byte_tokenizer import byte_tokenizer

    directory.mkdir()
    config(LAYERS).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config(LAYERS)).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"layers-{int(layer[1]) // 4}" if layer else name, []).append(name)
    generator, index = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(files.values()):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in names:
            scale = 0.02 if "embed" in name else shapes[name][-1] ** -0.5
            drawn = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, scale, generator=generator)
            tensors[name] = drawn if drawn.ndim > 1 else 1 + drawn
        save_file(tensors, directory / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shallow(checkpoint: Path, directory: Path, layers: int) -> None:
    """The same checkpoint's first layers, by links to its files."""
    directory.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix in (".safetensors", ".jinja") or "token" in file.name:
            (directory / file.name).symlink_to(file)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    kept = {
        name: file
        for name, file in index["weight_map"].items()
        if (found := re.match(r"model\.layers\.(\d+)\.", name)) is None or int(found[1]) < layers
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    config(layers).save_pretrained(directory)


def recipe(model: Path, text: Path, sequences: int, length: int) -> dict[str, Any]:
    return {
        "name": "large",
        "model": {"path": str(model), "streaming": "always"},
        "traffic": {
            "sources": [{"kind": "text", "path": str(text)}],
            "sequences": sequences,
            "sequence_length": length,
        },
        "codec": {
            "metric": "attention",
            "iterations": 2,
            "keys": {"width": 128, "stages": 3},
            "values": {"width": 128, "stages": 2},
        },
        "export": {"max_length": 8192},
        "evaluate": None,
    }


def run_stages(recipe_file: Path, work: Path, last: str) -> None:
    """What `gsrq build` does up to the stage ``last``; runs in the process that is measured."""
    from gsrq_export.build.source import Source
    from gsrq_export.build.stages import stages
    from gsrq_export.recipe import load_recipe
    from gsrq_export.stages.engine import Pipeline
    from gsrq_export.stages.progress import make_reporter

    source = Source(load_recipe(recipe_file))
    source.check()
    planned = stages(source)
    upto = [stage.name for stage in planned].index(last) + 1
    Pipeline(work, planned[:upto], make_reporter()).run()


class Watch:
    """Peaks of a process, from one reset to the next."""

    def __init__(self, pid: int) -> None:
        self.status, self.refs = Path(f"/proc/{pid}/status"), Path(f"/proc/{pid}/clear_refs")
        self.private = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def reset(self) -> None:
        self.refs.write_text("5")  # the high-water mark becomes what is resident now
        self.private = 0

    def peaks(self) -> dict[str, int]:
        """Resident, mapped file pages included, as the kernel counted it; private as sampled."""
        return {"peak_resident_bytes": self._read("VmHWM"), "peak_private_bytes_sampled": self.private}

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self, field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", self.status.read_text())
        return int(found[1]) * 1024 if found else 0

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                self.private = max(self.private, self._read("RssAnon"))
            except OSError:  # the process has ended
                return


def measure(arguments: list[str], limit: int) -> dict[str, Any]:
    """Run this file's ``--build`` and read its stages' peaks."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limited)
    watch, found = Watch(process.pid), {}
    started, name = time.monotonic(), HASHING
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", flush=True)
        begun, ended = re.match(r"(\w+): started", line), re.match(r"(\w+): finished", line)
        if begun or ended:
            found[name] = {"seconds": round(time.monotonic() - started, 1), **watch.peaks()}
            started, name = time.monotonic(), begun[1] if begun else "between stages"
            watch.reset()
    code = process.wait()
    watch.stop()
    if code:
        raise SystemExit(f"the build ended with status {code}")
    found.pop("between stages", None)
    return found


def check(work: Path, checkpoint: Path) -> dict[str, Any]:
    """Whether what was written is what it should be: weights in the ONNX file are the checkpoint's, codebooks sound."""
    import onnx
    import torch

    from gsrq_export.codec.storage import load_codebooks
    from gsrq_export.export.model import CODEBOOKS_FILE, INLINE_BYTES, MODEL_FILE, WEIGHTS_FILE
    from gsrq_export.model.checkpoint import Checkpoint

    stage = next(work.glob("onnx-*"))
    assert len(load_codebooks(stage / CODEBOOKS_FILE)) == LAYERS
    graph = onnx.load(str(stage / MODEL_FILE), load_external_data=False).graph
    stored, seen = Checkpoint(checkpoint), 0
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") != WEIGHTS_FILE or tensor.name not in stored.tensors:
            continue
        offset = int(where["offset"])
        with (stage / WEIGHTS_FILE).open("rb") as file:
            for part in stored.chunks(tensor.name):
                file.seek(offset)
                assert torch.equal(
                    part, torch.frombuffer(bytearray(file.read(4 * part.numel())), dtype=torch.float32).view(part.shape)
                ), tensor.name
                offset += 4 * part.numel()
                if seen % 7:  # of most tensors the first part, of some all
                    break
        seen += 1
    assert seen == sum(4 * of.elements > INLINE_BYTES for of in stored.tensors.values())
    return {
        "onnx_bytes": sum(f.stat().st_size for f in stage.iterdir()),
        "weights_compared": seen,
    }


def timed(doing: Callable[[], Any]) -> float:
    started = time.monotonic()
    doing()
    return round(time.monotonic() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--limit", type=float, default=10.0, help="GB of private memory")
    parser.add_argument("--keep", action="store_true", help="do not delete what was written")
    parser.add_argument("--build", nargs=3, metavar=("RECIPE", "WORK", "LAST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        run_stages(Path(args.build[0]), Path(args.build[1]), args.build[2])
        return
    scratch = args.scratch / "large_model"
    scratch.mkdir(parents=True, exist_ok=args.keep)
    load, limit = os.getloadavg()[0], int(args.limit * 1e9)
    try:
        model, text, few = scratch / "model", scratch / "text.txt", scratch / "two-layers"
        writing = timed(lambda: write_checkpoint(model)) if not model.is_dir() else None
        text.write_text("".join(f"Line {i} says that {i} squared is {i * i}.\n" for i in range(20_000)))
        shutil.rmtree(few, ignore_errors=True)
        shallow(model, few, 2)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        result: dict[str, Any] = {
            "environment": {**environment(), "cores": os.cpu_count(), "load_average_1min_at_start": load},
            "dimensions": {**DIMENSIONS, "num_hidden_layers": LAYERS},
            "checkpoint_bytes": size,
            "float32_bytes": 2 * size,
            "seconds_to_write_checkpoint": writing,
            "limit_of_private_bytes": limit,
            "codec": recipe(model, text, 1, 1)["codec"],
            "published": False,
        }
        runs = {}
        for name, directory, sequences, length, last in (
            ("build", model, args.sequences, args.length, "onnx"),
            ("one_full_shard_through_two_layers", few, 16, 256, "capture"),
        ):
            given, work = scratch / f"{name}.json", scratch / f"{name}.work"
            given.write_text(json.dumps(recipe(directory, text, sequences, length)))
            peaks = measure(["--scratch", str(scratch), "--build", str(given), str(work), last], limit)
            runs[name] = {"sequences": sequences, "sequence_length": length, "stages": peaks}
            if last == "onnx":
                runs[name]["checked"] = check(work, model)
            result |= runs
            result["peak_resident_bytes"] = max(
                stage["peak_resident_bytes"] for run in runs.values() for stage in run["stages"].values()
            )
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(result, indent=1), flush=True)
            shutil.rmtree(work)
    finally:
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()

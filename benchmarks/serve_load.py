"""The Triton server on the coded cache against the same server on exact float32 keys and values, under load.

python benchmarks/serve_load.py --artifact artifacts/demo --model assets/demo-6m \\
    --out benchmarks/results/serve_load.json

Two servers run side by side and take turns: at each concurrency, all clients send one request to the one, then to the
other, in streams. Prompts and answers together fill the context. First each server's greedy text is compared: the
coded one's with `gsrq generate`, the exact one's with transformers in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from environment import ROOT, environment
from exact_serving import write_exact
from serve_soak import WORDS, memory
from transformers import AutoModelForCausalLM

from gsrq_export.export.triton_python import PythonSettings
from gsrq_export.runtime.generate import Generation, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel
from gsrq_export.serve.limits import Limits
from gsrq_export.serve.server import Addresses, Running, find_server, prepare

NAME = "load"
AT = {"coded": Addresses("127.0.0.1", 18810, 18811, 18812), "exact": Addresses("127.0.0.1", 18820, 18821, 18822)}
CONCURRENCY = (1, 8, 32)
GIGABYTE = 10**9


@contextlib.contextmanager
def server(kind: str, directory: Path, threads: int) -> Iterator[Running]:
    settings = PythonSettings(Limits(max_sequences=max(CONCURRENCY)), threads, artifact=str(directory.absolute()))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(find_server(), Path(folder), NAME, settings, AT[kind])
        if kind == "exact":
            code = f"import sys\n\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
            code += "from exact_serving import TritonPythonModel  # noqa: F401\n"
            (Path(folder) / "repository" / NAME / "1" / "model.py").write_text(code)
        running = Running(*prepared, AT[kind], NAME)
        try:
            running.wait_ready(300)
            yield running
        finally:
            running.stop()


def stream(kind: str, prompt: str, most: int, found: list[dict[str, Any]]) -> None:
    """One request: seconds to the first token and to the last, tokens, text."""
    connection = http.client.HTTPConnection(AT[kind].host, AT[kind].http, timeout=600)
    start = time.monotonic()
    body = json.dumps({"text_input": prompt, "max_tokens": most})
    connection.request("POST", f"/v2/models/{NAME}/generate_stream", body)
    answer, first, text, last = connection.getresponse(), None, "", {}
    for line in answer:
        if line.startswith(b"data:"):
            last = json.loads(line[5:])
            assert "error" not in last, last
            text += last["text_output"]
            first = first or time.monotonic() - start
    connection.close()
    found.append(
        {"first": first, "seconds": time.monotonic() - start, "tokens": last["completion_tokens"], "text": text}
    )


def together(kind: str, prompts: list[str], most: int, process: psutil.Process) -> dict[str, Any]:
    """All prompts at once: time to first token, tokens a second, the most memory seen."""
    found: list[dict[str, Any]] = []
    before, start = memory(process), time.monotonic()
    threads = [threading.Thread(target=stream, args=(kind, prompt, most, found)) for prompt in prompts]
    for thread in threads:
        thread.start()
    peak = before
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, memory(process))
        time.sleep(0.5)
    wall = time.monotonic() - start
    assert len(found) == len(prompts), "a client failed"
    between = [(f["seconds"] - f["first"]) / (f["tokens"] - 1) for f in found if f["tokens"] > 1]
    return {
        "first_token_seconds": median(f["first"] for f in found),
        "slowest_first_token_seconds": max(f["first"] for f in found),
        "tokens": sum(f["tokens"] for f in found),
        "seconds": wall,
        "tokens_per_second": sum(f["tokens"] for f in found) / wall,
        "seconds_between_tokens": median(between),
        "memory_rise_bytes": peak - before,
    }


def check(artifact: Path, checkpoint: Path, prompt: str, most: int = 32) -> None:
    """Hold each server's greedy text to its reference."""
    tokenizer, eos = load_tokenizer(artifact), load_eos(artifact)
    coded = Generation(OrtModel(artifact, 1), tokenizer, prompt, max_new_tokens=most, eos=eos)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most)
    new = [i for i in made[0, ids.shape[1] :].tolist() if i not in eos]
    expected = {"coded": "".join(coded), "exact": tokenizer.decode(new)}
    for kind, text in expected.items():
        found: list[dict[str, Any]] = []
        stream(kind, prompt, most, found)
        assert found[0]["text"] == text, (kind, found[0]["text"], text)


def sequence_bytes(artifact: Path, tokens: int) -> dict[str, int]:
    """Bytes of one sequence's cache, by the files; codebooks, which all sequences share, apart."""
    metadata = OrtModel(artifact, 1).metadata
    exact = sum(8 * of.num_kv_heads * of.head_dim for of in metadata.layers) * tokens
    books = (artifact / "codebooks.safetensors").stat().st_size
    return {"coded": metadata.row_bytes(metadata.rule.coded(tokens)), "exact": exact, "codebooks": books}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that the artifact was built from")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="at a concurrency of 1; fewer where there are more")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.artifact)
    context = min(options.context, OrtModel(options.artifact, 1).max_length)
    length, rng = context - options.new_tokens, random.Random(0)

    def prompt(tokens: int) -> str:
        words: list[str] = []
        while len(tokenizer.encode(" ".join(words))) < tokens - 8:
            words += rng.choices(WORDS, k=8)
        while len(tokenizer.encode(" ".join(words))) > tokens:
            words.pop()
        return " ".join(words)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact"
        exact.mkdir()
        write_exact(options.artifact, exact)
        with (
            server("coded", options.artifact, options.threads) as first,
            server("exact", exact, options.threads) as second,
        ):
            processes = {"coded": psutil.Process(first.process.pid), "exact": psutil.Process(second.process.pid)}
            check(options.artifact, options.model, prompt(200))
            for kind in AT:  # what the first long request sets up is not measured
                stream(kind, prompt(length), 2, [])
            for many in CONCURRENCY:
                for turn in range(options.rounds if many == 1 else 1):
                    prompts = [prompt(length) for _ in range(many)]
                    for kind in ("coded", "exact") if turn % 2 == 0 else ("exact", "coded"):
                        row = {"server": kind, "concurrency": many, "turn": turn}
                        row |= together(kind, prompts, options.new_tokens, processes[kind])
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    size = sequence_bytes(options.artifact, context)
    result = {
        "environment": environment(),
        "model": options.model.name,
        "context": context,
        "prompt_tokens": length,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "rows": rows,
        "sequence_bytes": size,
        "sequences_in_a_gigabyte": {
            "coded": (GIGABYTE - size["codebooks"]) // size["coded"],
            "exact": GIGABYTE // size["exact"],
        },
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

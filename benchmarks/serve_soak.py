"""Does a server's memory stay flat? Clients of all kinds for ten minutes, and the memory of the server's processes.

python benchmarks/serve_soak.py --artifact artifacts/demo --out benchmarks/results/serve_soak.json

Before the clock starts, and again at its end, a greedy answer is compared with that of `gsrq generate`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from environment import environment

from gsrq_export.export.triton_python import PythonSettings
from gsrq_export.runtime.generate import Generation, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel
from gsrq_export.serve.limits import Limits
from gsrq_export.serve.server import Addresses, Running, find_server, prepare

NAME = "soak"
TEXT = "the old man walked slowly through a dark wood and said nothing of what had been seen there before"
WORDS = TEXT.split()
AT = Addresses("127.0.0.1", 18800, 18801, 18802)


def memory(process: psutil.Process) -> int:
    """Bytes that the server's processes have for themselves, shared ones in proportion."""
    return sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True)))


def metrics() -> dict[str, float]:
    with urllib.request.urlopen(f"http://{AT.host}:{AT.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("gsrq_")}


def client(rng: random.Random, until: float, counts: dict[str, int], lock: threading.Lock) -> None:
    """Whole answers, streams, streams that are left in the middle, and requests to refuse, by chance."""
    while time.monotonic() < until:
        kind = rng.choice(["whole", "stream", "stream", "left", "left", "refused"])
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 300)))
        body: dict[str, Any] = {"text_input": prompt, "max_tokens": rng.randint(5, 150), "stream": kind != "whole"}
        if kind == "refused":
            body["max_tokens"] = 10**9
        if rng.random() < 0.5:
            body |= {"temperature": 0.8, "seed": rng.randint(0, 10**6), "stop": ["zzz"]}
        connection = http.client.HTTPConnection(AT.host, AT.http, timeout=120)
        path = f"/v2/models/{NAME}/generate" + ("_stream" if kind in ("stream", "left") else "")
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        if kind == "left":
            answer.read(200)
        else:
            text = answer.read()
            good = (b"max_tokens" in text) if kind == "refused" else b"finish_reason" in text
            kind = kind if good else "wrong"
        connection.close()
        with lock:
            counts[kind] = counts.get(kind, 0) + 1


def answer_is_right(artifact: Path) -> bool:
    prompt, most = "the old man walked slowly", 40
    run = Generation(
        OrtModel(artifact, 1), load_tokenizer(artifact), prompt, max_new_tokens=most, eos=load_eos(artifact)
    )
    body = json.dumps({"text_input": prompt, "max_tokens": most, "stream": False}).encode()
    request = urllib.request.Request(f"http://{AT.host}:{AT.http}/v2/models/{NAME}/generate", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bool(json.loads(answer.read())["text_output"] == "".join(run))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = PythonSettings(Limits(max_sequences=16), 1, artifact=str(options.artifact.absolute()))
    with tempfile.TemporaryDirectory() as folder:
        running = Running(*prepare(find_server(), Path(folder), NAME, settings, AT), AT, NAME)
        try:
            running.wait_ready(300)
            assert answer_is_right(options.artifact), "the server's text is not that of gsrq generate"
            counts: dict[str, int] = {}
            lock, start = threading.Lock(), time.monotonic()
            until = start + options.seconds
            threads = [
                threading.Thread(target=client, args=(random.Random(i), until, counts, lock))
                for i in range(options.clients)
            ]
            for thread in threads:
                thread.start()
            process, samples = psutil.Process(running.process.pid), []
            while time.monotonic() < until:
                samples.append({"seconds": round(time.monotonic() - start, 1), "bytes": memory(process)})
                time.sleep(10)
            for thread in threads:
                thread.join()
            time.sleep(3)
            assert answer_is_right(options.artifact)
            time.sleep(1)
            found = metrics()
        finally:
            running.stop()
    assert counts.get("wrong", 0) == 0, counts
    assert found["gsrq_slots_used"] == found["gsrq_cache_pages_used"] == found["gsrq_cache_pages_reserved"] == 0, found
    result = {
        "environment": environment(),
        "seconds": options.seconds,
        "clients": options.clients,
        "requests": counts,
        "metrics": found,
        "memory": samples,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    half = [s["bytes"] for s in samples[len(samples) // 2 :]]
    print(json.dumps({"requests": counts, "second half, MB": [round(min(half) / 1e6), round(max(half) / 1e6)]}))


if __name__ == "__main__":
    main()

"""A real tritonserver on the artifact's own python-backend repository, with Triton's own clients."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_triton import fetch, inputs, require_server, settled, started
from serve_artifact import PROMPTS, generated, served_artifact

from gsrq_export.errors import GsrqError
from gsrq_export.export.triton_python import PythonSettings, write_python_model
from gsrq_export.runtime.generate import Sampling
from gsrq_export.serve.limits import Limits
from gsrq_export.serve.server import Running

NAME = "served"
VANISHING = """
import sys, time
import numpy, tritonclient.grpc as triton
port, name, prompt = sys.argv[1:]
client = triton.InferenceServerClient(f"127.0.0.1:{port}")
client.start_stream(lambda result, error: print("going", flush=True))
text, most = triton.InferInput("text_input", [1], "BYTES"), triton.InferInput("max_tokens", [1], "INT32")
text.set_data_from_numpy(numpy.array([prompt.encode()], object))
most.set_data_from_numpy(numpy.array([250], numpy.int32))
client.async_stream_infer(name, [text, most])
time.sleep(60)
"""
pytestmark = pytest.mark.slow


def repository() -> Path:
    path = served_artifact()
    if not (path / "triton" / "python" / NAME).exists():
        limits = Limits(max_sequences=32, max_queue=16, max_new_tokens=300)
        write_python_model(path, NAME, PythonSettings(limits, threads=1))
    return path / "triton" / "python"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    require_server()
    with started(repository(), NAME) as running:
        yield running


class Stream:
    """One gRPC stream with one request; ``answers`` gets (result, error)."""

    def __init__(self, server: Running, prompt: str, **values: Any) -> None:
        import tritonclient.grpc as triton

        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client = triton.InferenceServerClient(f"127.0.0.1:{server.at.grpc}")
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))
        self.client.async_stream_infer(NAME, inputs(prompt, **values), enable_empty_final_response=True)

    def all(self) -> tuple[str, tuple[int, ...], str, int]:
        """(text, ids, finish reason, answers) once it has ended."""
        text, ids, finish, count = b"", [], b"", 0
        while True:
            result, error = self.answers.get(timeout=60)
            if error is not None:
                raise error
            if result.as_numpy("text_output") is not None:
                text += result.as_numpy("text_output")[0]
                ids += result.as_numpy("token_ids").tolist()
                finish = result.as_numpy("finish_reason")[0]
                count += 1
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        self.client.stop_stream()
        return text.decode(), tuple(ids), finish.decode(), count


def test_32_streams_equal_generate(server: Running) -> None:
    streams = [Stream(server, p, max_tokens=10 + i) for i, p in enumerate(PROMPTS)]
    for i, (prompt, stream) in enumerate(zip(PROMPTS, streams, strict=True)):
        text, ids, finish, count = stream.all()
        assert (text, ids, finish) == generated(prompt, 10 + i), prompt
        assert count > 3, "it streams"
    after = settled(server.at.metrics, 32)
    assert after["gsrq_cache_pages_used"] == after["gsrq_cache_pages_reserved"] == 0
    assert after["gsrq_decode_steps_total"] < after["gsrq_new_tokens_total"] / 3


def test_sampling_and_stop(server: Running) -> None:
    text, _, finish, _ = Stream(server, PROMPTS[3], max_tokens=25, temperature=0.9, top_k=30, top_p=0.95, seed=7).all()
    assert (text, finish) == (generated(PROMPTS[3], 25, Sampling(0.9, 30, 0.95, 7))[0], "max_new_tokens")
    whole = generated(PROMPTS[3], 40)[0]
    text, _, finish, _ = Stream(server, PROMPTS[3], max_tokens=40, stop=["nowhere", whole[30:35]]).all()
    assert (text, finish) == (whole[: whole.index(whole[30:35])], "stop_string")


def test_clients_that_vanish_leave_nothing(server: Running) -> None:
    before = settled(server.at.metrics)
    child = subprocess.Popen(
        [sys.executable, "-c", VANISHING, str(server.at.grpc), NAME, PROMPTS[9]], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "going\n"
    child.kill()  # no goodbye
    child.wait()
    body = json.dumps({"text_input": PROMPTS[10], "max_tokens": 250})
    head = f"POST /v2/models/{NAME}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.at.http)) as plain:
        plain.sendall((head + body).encode())
        assert plain.recv(100)
    streams = [Stream(server, p, max_tokens=250) for p in PROMPTS[:8]]
    for stream in streams:
        stream.answers.get(timeout=30)
        stream.client.stop_stream(cancel_requests=True)
    after = settled(server.at.metrics, before["gsrq_requests_total"] + 10)
    assert after["gsrq_cache_pages_used"] == after["gsrq_cache_pages_reserved"] == 0
    assert after["gsrq_cancelled_total"] - before["gsrq_cancelled_total"] >= 5
    accepted, ended = (after["gsrq_requests_total"], after["gsrq_finished_total"] + after["gsrq_cancelled_total"])
    assert accepted == ended
    assert Stream(server, PROMPTS[9], max_tokens=15).all()[:3] == generated(PROMPTS[9], 15)


def test_http(server: Running) -> None:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{server.at.http}")
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.get_model_config(NAME)["model_transaction_policy"] == {"decoupled": True}
    assert {i["name"] for i in client.get_model_metadata(NAME)["inputs"]} >= {"text_input", "stop", "messages"}
    body = {"text_input": PROMPTS[5], "max_tokens": 20, "stream": False}
    status, answer = fetch(server.at.http, f"/v2/models/{NAME}/generate", body)
    assert status == 200, answer
    assert json.loads(answer)["text_output"] == generated(PROMPTS[5], 20)[0]
    status, answer = fetch(server.at.http, f"/v2/models/{NAME}/generate_stream", {**body, "stream": True})
    pieces = [json.loads(line[6:])["text_output"] for line in answer.splitlines() if line.startswith("data: ")]
    assert "".join(pieces) == generated(PROMPTS[5], 20)[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": "x", "max_tokens": 2_000_000_000}, "max_tokens: 2000000000 is not in 1 .. 300"),
        ({"text_input": "x", "max_tokens": -1}, "max_tokens: -1"),
        ({"text_input": "x", "temperature": -1.0}, "temperature: -1.0"),
        ({"text_input": "word " * 2000}, "exceed the limit"),
        ({"text_input": ""}, "prompt: it is empty"),
        ({"max_tokens": 3}, "prompt: nothing given"),
        ({"text_input": "x", "messages": "[]"}, "text_input and messages given"),
        ({"messages": "[]"}, "has no chat template"),
        (b"{not json", ""),
        (b"\x00" * 5000, ""),
    ],
)
def test_hostile_requests_are_refused(server: Running, body: Any, message: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps({"stream": False, **body}).encode()
    status, answer = fetch(server.at.http, f"/v2/models/{NAME}/generate", raw=raw)
    assert 400 <= status < 600
    assert message in json.loads(answer)["error"]
    good = {"text_input": PROMPTS[0], "max_tokens": 3, "stream": False}
    assert fetch(server.at.http, f"/v2/models/{NAME}/generate", good)[0] == 200, "it still serves"


def test_more_than_the_queue_holds(server: Running) -> None:
    from tritonclient.utils import InferenceServerException

    streams = [Stream(server, PROMPTS[i % 8], max_tokens=40) for i in range(70)]
    refused = []
    for stream in streams:
        try:
            stream.all()
        except InferenceServerException as error:
            refused.append(str(error))
            stream.client.stop_stream()
    assert refused
    assert all("requests wait already" in text for text in refused)
    assert settled(server.at.metrics)["gsrq_cache_pages_used"] == 0


def test_restart_is_clean(server: Running) -> None:
    """The last of this file: it stops the server that all share."""
    streams = [Stream(server, p, max_tokens=250) for p in PROMPTS[:4]]
    for stream in streams:
        stream.answers.get(timeout=30)
    server.stop()
    for stream in streams:
        threading.Thread(target=stream.client.stop_stream, kwargs={"cancel_requests": True}).start()
    with started(repository(), NAME) as running:
        assert Stream(running, PROMPTS[2], max_tokens=15).all()[:3] == generated(PROMPTS[2], 15)
        assert settled(running.at.metrics, 1)["gsrq_requests_total"] == 1


def test_a_numpy_that_the_server_cannot_read_is_refused_at_start(capfd: pytest.CaptureFixture[str]) -> None:
    """nvidia-pytriton's server with this environment's own numpy 2, in place of the one beside it."""
    found = require_server()
    if not found.paths:
        pytest.skip("the server has no numpy of its own: it reads that of this environment")
    with (
        pytest.raises(GsrqError, match="tritonserver ended with status"),
        started(repository(), NAME, replace(found, paths=())),
    ):
        pass
    assert "cannot read arrays of numpy 2" in "".join(capfd.readouterr())

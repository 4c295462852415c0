"""A real tritonserver for the tests, and clients of it."""

from __future__ import annotations

import json
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsrq_export import GsrqError
from gsrq_export.serve.server import Addresses, Running, find_server


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def require_server() -> Any:
    try:
        server = find_server()
    except GsrqError as error:
        pytest.skip(f"tritonserver cannot be had here: {error.problem}")
    pytest.importorskip("tritonclient.grpc")
    return server


@contextmanager
def started(repository: Path, name: str, server: Any = None) -> Iterator[Running]:
    """A server on a repository that is there."""
    from gsrq_export.serve.server import command

    at = Addresses("127.0.0.1", *free_ports(3))
    with tempfile.TemporaryDirectory(prefix="gsrq-triton-") as folder:
        running = Running(*command(server or require_server(), Path(folder), repository, at), at, name)
        try:
            running.wait_ready(120)
            yield running
        finally:
            running.stop()


def inputs(prompt: str, **values: Any) -> list[Any]:
    import tritonclient.grpc as triton

    types = {"max_tokens": "INT32", "top_k": "INT32", "seed": "INT64", "temperature": "FP64", "top_p": "FP64"}
    numpy_types = {"INT32": np.int32, "INT64": np.int64, "FP64": np.float64}
    made = [_tensor("text_input", "BYTES", np.array([prompt.encode()], object))]
    for name, value in values.items():
        if name == "stop":
            made.append(_tensor(name, "BYTES", np.array([s.encode() for s in value], object)))
        else:
            made.append(_tensor(name, types[name], np.array([value], numpy_types[types[name]])))
    assert all(isinstance(tensor, triton.InferInput) for tensor in made)
    return made


def _tensor(name: str, kind: str, value: Any) -> Any:
    import tritonclient.grpc as triton

    tensor = triton.InferInput(name, list(value.shape), kind)
    tensor.set_data_from_numpy(value)
    return tensor


def fetch(port: int, path: str, body: Any = None, raw: bytes | None = None) -> tuple[int, str]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(port: int) -> dict[str, float]:
    lines = fetch(port, "/metrics")[1].splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("gsrq_")}


def settled(port: int, requests: float = 0, seconds: float = 20) -> dict[str, float]:
    """The metrics, once the server has accepted so many requests in all and has nothing to do."""
    until = time.monotonic() + seconds
    while True:
        found = metrics(port)  # up to REPORT_SECONDS old, so the number of requests tells whether it is of today
        if found["gsrq_requests_total"] >= requests and not found["gsrq_slots_used"] and not found["gsrq_queue"]:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.1)

"""`gsrq serve --openai` as a user starts it, and the openai client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import ROOT
from real_triton import fetch, free_ports, require_server, settled
from serve_artifact import PROMPTS, generated, served_artifact

from gsrq_export.runtime.generate import Generation, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel

pytestmark = pytest.mark.slow
NAME = "demo"


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served artifact with a chat template, which the demo model lacks."""
    path = shutil.copytree(served_artifact(), tmp_path_factory.mktemp("chat") / "artifact")
    file = path / "tokenizer" / "tokenizer_config.json"
    data = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**data, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def ports(artifact: Path) -> Iterator[tuple[int, int]]:
    """(OpenAI port, metrics port) of a running `gsrq serve`."""
    require_server()
    pytest.importorskip("uvicorn")
    http, grpc, metrics, front = free_ports(4)
    arguments = ["--artifact", str(artifact), "--name", NAME, "--openai", "--openai-port", str(front)]
    arguments += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "serve", *arguments, "--max-new-tokens", "280", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        for _ in range(1200):
            assert process.poll() is None
            try:
                if fetch(front, "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield front, metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        with pytest.raises(OSError, match="refused"):
            fetch(http, "/v2/health/live")
    finally:
        process.kill()


@pytest.fixture
def client(ports: tuple[int, int]) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{ports[0]}/v1", api_key="none", max_retries=0)


def test_completions(client: Any) -> None:
    assert [m.id for m in client.models.list()] == [NAME]
    text, ids, _ = generated(PROMPTS[4], 30)
    whole = client.completions.create(model=NAME, prompt=PROMPTS[4], max_tokens=30, temperature=0)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
    assert whole.usage.completion_tokens == len(ids)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model=NAME, prompt=PROMPTS[4], max_tokens=30, temperature=0, **options))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text
    assert len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == len(ids)
    assert chunks[-2].choices[0].finish_reason == "length"
    stopped = client.completions.create(model=NAME, prompt=PROMPTS[4], max_tokens=30, temperature=0, stop=text[9:14])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[: text.index(text[9:14])], "stop")
    seeded = [client.completions.create(model=NAME, prompt=PROMPTS[4], max_tokens=9, seed=5) for _ in range(2)]
    assert seeded[0].choices[0].text == seeded[1].choices[0].text


def test_a_client_that_leaves(client: Any, ports: tuple[int, int]) -> None:
    before = settled(ports[1])
    stream = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=280, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    after = settled(ports[1], before["gsrq_requests_total"] + 1)
    assert after["gsrq_cancelled_total"] == before["gsrq_cancelled_total"] + 1
    assert after["gsrq_cache_pages_used"] == 0
    status, text = fetch(ports[0], "/metrics")
    assert status == 200
    assert "gsrq_slots_used" in text


def test_chat(client: Any, artifact: Path) -> None:
    import openai

    messages = [{"role": "system", "content": "the old man"}, {"role": "user", "content": "walked slowly"}]
    tokenizer = load_tokenizer(artifact)
    ids = tokenizer.encode("system: the old man\nuser: walked slowly\nassistant:", add_special_tokens=False)
    text = "".join(Generation(OrtModel(artifact, 1), tokenizer, ids, max_new_tokens=20, eos=load_eos(artifact)))
    whole = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=20, temperature=0)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", text)
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=20, temperature=0, stream=True)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.chat.completions.create(model=NAME, messages=messages, tools=[{"type": "function"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=NAME, messages=[])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{not json", 400, "not JSON"),
        (b"[1]", 400, "body: list"),
        (b"[" * 100_000, 400, "not JSON"),
        ({"model": NAME}, 400, "prompt"),
        ({"model": "other", "prompt": "x"}, 404, "not served"),
        ({"model": NAME, "prompt": "x", "max_tokens": 10**9}, 400, "max_tokens: 1000000000"),
        ({"model": NAME, "prompt": "x", "max_tokens": 10**30}, 400, "max_tokens"),
        ({"model": NAME, "prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"model": NAME, "prompt": "x", "n": 5}, 400, "n: not supported"),
        ({"model": NAME, "prompt": "x", "nonsense": 5}, 400, "nonsense"),
        ({"model": NAME, "prompt": "\ud800"}, 400, "surrogate"),
        ({"model": NAME, "prompt": "word " * 2000}, 400, "exceed the limit"),
        ({"model": NAME, "prompt": [10**20]}, 400, "out of range"),
        ({"model": NAME, "prompt": []}, 400, "empty"),
    ],
)
def test_hostile_requests(ports: tuple[int, int], body: Any, status: int, message: str) -> None:
    raw = body if isinstance(body, bytes) else None
    got, answer = fetch(ports[0], "/v1/completions", body, raw)
    assert got == status, answer
    assert message in answer
    assert fetch(ports[0], "/health")[0] == 200

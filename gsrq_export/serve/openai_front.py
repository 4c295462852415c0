"""An OpenAI-compatible front of a running tritonserver: HTTP here, gRPC to the server.

A request opens one gRPC stream. When its client goes away the stream is cancelled, which frees its slot in the engine.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

from gsrq_export.errors import GsrqError
from gsrq_export.serve.openai_schema import MAX_BODY_BYTES, Chat, Completion, parse
from gsrq_export.serve.server import Addresses

FINISH = {"eos": "stop", "stop_string": "stop", "max_new_tokens": "length", "max_length": "length"}


@dataclass(frozen=True)
class Piece:
    text: str
    finish: str  # of FINISH's values; "" until the end
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Front:
    """The routes.

    Args:
        at: where the tritonserver listens.
        name: its model.
    """

    def __init__(self, at: Addresses, name: str) -> None:
        self._at, self._name, self._created = at, name, int(time.time())
        self._client: Any = None
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ]
        )

    @property
    def client(self) -> Any:
        if self._client is None:  # made in the loop that uses it
            self._client = triton.InferenceServerClient(f"{self._at.host}:{self._at.grpc}")
        return self._client

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def models(self, request: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "gsrq"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        try:
            ready = await self.client.is_model_ready(self._name)
        except InferenceServerException:
            ready = False
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        address = f"http://{self._at.host}:{self._at.metrics}/metrics"

        def read() -> str:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return str(answer.read().decode())

        try:
            return PlainTextResponse(await asyncio.to_thread(read))
        except OSError as error:
            return PlainTextResponse(f"tritonserver's metrics: {error}\n", 503)

    async def _answer(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        pieces: AsyncIterator[Piece] | None = None
        try:
            wanted = parse(kind, await _body(request))
            if wanted.model != self._name:
                return _error(404, f"model: {wanted.model!r} is not served here", "model_not_found")
            pieces = self._pieces(wanted)
            # The first piece is awaited before an answer begins, so that a refusal has its own status.
            first = await anext(pieces)
            writer = _Writer(kind is Chat, self._name, wanted)
            if wanted.stream:
                return StreamingResponse(writer.events(first, pieces), media_type="text/event-stream")
            whole, last = [first.text], first
            async for last in pieces:
                whole.append(last.text)
                if await request.is_disconnected():
                    await pieces.aclose()  # type: ignore[attr-defined]
                    break
            return JSONResponse(writer.whole("".join(whole), last))
        except GsrqError as error:
            return _error(400, str(error))
        except InferenceServerException as error:
            status = {"StatusCode.INVALID_ARGUMENT": 400, "StatusCode.UNAVAILABLE": 503}.get(str(error.status()))
            text = error.message()
            if status is None:  # an error within a stream comes without its code
                status = 503 if "requests wait already" in text or "shutting down" in text else 400
            return _error(status, text)

    async def _pieces(self, wanted: Any) -> AsyncIterator[Piece]:
        inputs = _inputs(wanted)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self._name, "inputs": inputs}

        call = self.client.stream_infer(requests())
        try:
            async for result, error in call:
                if error is not None:
                    raise error
                if result.as_numpy("text_output") is None:
                    continue
                text, finish, prompt, made = (
                    result.as_numpy(n)[0]
                    for n in ("text_output", "finish_reason", "prompt_tokens", "completion_tokens")
                )
                yield Piece(text.decode(), FINISH.get(finish.decode(), ""), int(prompt), int(made))
                if finish:
                    return
        finally:
            call.cancel()


class _Writer:
    """The API's JSON for one request."""

    def __init__(self, chat: bool, name: str, wanted: Any) -> None:
        self._chat = chat
        options = wanted.stream_options
        self._usage = options is not None and options.include_usage
        prefix, self._object = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        body = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, "finish_reason": last.finish or None, "logprobs": None, **body}
        return {**self._head, "object": self._object, "choices": [choice], "usage": last.usage}

    async def events(self, first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[str]:
        piece = first
        try:
            yield self._event(piece, role=True)
            async for piece in rest:
                yield self._event(piece)
            if self._usage:
                yield self._line({"choices": [], "usage": piece.usage})
            yield "data: [DONE]\n\n"
        except InferenceServerException as error:
            yield f"data: {json.dumps(_problem(error.message(), 'server_error'))}\n\n"
        finally:
            await rest.aclose()  # type: ignore[attr-defined]

    def _event(self, piece: Piece, role: bool = False) -> str:
        delta: dict[str, Any] = {"content": piece.text, **({"role": "assistant"} if role else {})}
        body = {"delta": delta} if self._chat else {"text": piece.text}
        choice = {"index": 0, "finish_reason": piece.finish or None, "logprobs": None, **body}
        return self._line({"choices": [choice], **({"usage": None} if self._usage else {})})

    def _line(self, data: dict[str, Any]) -> str:
        name = f"{self._object}.chunk" if self._chat else self._object
        return f"data: {json.dumps({**self._head, 'object': name, **data})}\n\n"


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise GsrqError(f"body: over {MAX_BODY_BYTES} bytes", "send less")
    return body


def _inputs(wanted: Any) -> list[Any]:
    """Triton's inputs; the API's defaults are filled in: temperature 1, a seed of chance."""
    temperature = 1.0 if wanted.temperature is None else wanted.temperature
    seed = secrets.randbits(62) if wanted.seed is None else wanted.seed
    most = wanted.max_tokens
    if isinstance(wanted, Chat):
        most = wanted.max_completion_tokens or most
        messages = json.dumps([m.model_dump() for m in wanted.messages])
        tensors = [("messages", "BYTES", np.array([messages.encode()], object))]
    elif isinstance(wanted.prompt, str):
        tensors = [("text_input", "BYTES", np.array([_encode(wanted.prompt)], object))]
    else:
        if any(not 0 <= token < 1 << 31 for token in wanted.prompt):
            raise GsrqError("prompt: a token id is out of range", "use the artifact's own tokenizer")
        tensors = [("input_ids", "INT64", np.array(wanted.prompt, np.int64))]
    tensors += [
        ("temperature", "FP64", np.array([temperature])),
        ("top_k", "INT32", np.array([wanted.top_k], np.int32)),
        ("top_p", "FP64", np.array([1.0 if wanted.top_p is None else float(wanted.top_p)])),
        ("seed", "INT64", np.array([seed], np.int64)),
    ]
    if most is not None:
        tensors.append(("max_tokens", "INT32", np.array([most], np.int32)))
    if wanted.stop:
        stop = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop
        tensors.append(("stop", "BYTES", np.array([_encode(s) for s in stop], object)))
    made = []
    for name, kind, value in tensors:
        tensor = triton.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        made.append(tensor)
    return made


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        raise GsrqError("prompt or stop: half a surrogate pair", "send valid Unicode") from None


def _problem(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _error(status: int, message: str, kind: str = "") -> Response:
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return JSONResponse(_problem(message, kind), status)

"""Requests of the OpenAI API that the front takes, checked. What it cannot do is refused by name, not ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gsrq_export.errors import GsrqError

MAX_BODY_BYTES = 16 << 20
# Fields of the API that change the answer and are not there: allowed only at the value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "echo": (False,),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "response_format": (None, {"type": "text"}),
}
IGNORED = {"user", "metadata", "store", "service_tier"}  # do not touch the text

Count = Annotated[int, Field(ge=1, lt=1 << 31)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0  # not OpenAI's; other servers have it
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


class Completion(_Common):
    prompt: str | list[int]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: str
    content: str


class Chat(_Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None


def parse(kind: type[Completion] | type[Chat], body: bytes) -> Any:
    """A request from its JSON.

    Raises:
        GsrqError: not JSON, a field that is missing, wrong, unknown or not supported.
    """
    if len(body) > MAX_BODY_BYTES:
        raise GsrqError(f"body: {len(body)} bytes", f"send at most {MAX_BODY_BYTES}")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise GsrqError(f"body: not JSON: {error}", "send a JSON object") from None
    if not isinstance(data, dict):
        raise GsrqError(f"body: {type(data).__name__}", "send a JSON object")
    for name, allowed in NEUTRAL.items():
        if name in data and data.pop(name) not in allowed:
            raise GsrqError(f"{name}: not supported", "leave it out")
    for name in IGNORED:
        data.pop(name, None)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise GsrqError(f"{field}: {first['msg']}", "see the API's reference for this field") from None

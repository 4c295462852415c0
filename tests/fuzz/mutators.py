"""Mutations that keep a file's frame whole, so that inputs reach what lies behind it: half of all inputs.

A length before a part of the file, as protobuf and safetensors have, is wrong after nearly every change of bytes, and
most changes leave JSON that is none; such a file is refused at once and nothing else of it is read. The other half of
the inputs are changed as any bytes.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import atheris
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

Mutator = Callable[[bytes, int, int], bytes]
NUMBERS = (0, 1, -1, 2, 7, 127, 255, 1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 63) - 1, -(1 << 63))
REALS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def safetensors(data: bytes, limit: int, seed: int) -> bytes:
    """The header changed, and its length with it."""
    rng, size = random.Random(seed), int.from_bytes(data[:8], "little")
    if rng.random() < 0.5 or size > len(data) - 8:
        return bytes(atheris.Mutate(data, limit))
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.8:
        header = atheris.Mutate(header, max(1, limit - 8 - len(body)))
    else:
        body = atheris.Mutate(body, max(1, limit - 8 - size))
    return (len(header).to_bytes(8, "little") + header + body)[:limit]


def protobuf(data: bytes, limit: int, seed: int) -> bytes:
    """One field somewhere in an ONNX model changed, removed, or repeated."""
    rng = random.Random(seed)
    try:
        model = onnx.ModelProto.FromString(data) if rng.random() < 0.5 else None
    except DecodeError:
        model = None
    if model is not None:
        message = _any_message(model, rng)
        fields = [field for field, _ in message.ListFields()]
        if fields:
            _change(message, rng.choice(fields), rng)
            changed = bytes(model.SerializeToString())
            if len(changed) <= limit:
                return changed
    return bytes(atheris.Mutate(data, limit))


def _any_message(message: Any, rng: random.Random) -> Any:
    """A message at any depth, by a walk that stops at each with one chance in four."""
    while rng.random() < 0.75:
        inner = [item for field, value in message.ListFields() if field.message_type for item in _items(value)]
        if not inner:
            break
        message = rng.choice(inner)
    return message


def _items(value: Any) -> list[Any]:
    return [value] if hasattr(value, "ListFields") else list(value)


def _change(message: Any, field: FieldDescriptor, rng: random.Random) -> None:
    value = getattr(message, field.name)
    repeated = hasattr(value, "extend")
    what = rng.randrange(4)
    if what == 0:
        if repeated:
            del value[rng.randrange(len(value))]
        else:
            message.ClearField(field.name)
    elif repeated and (what == 1 or field.message_type):
        value.extend([value[rng.randrange(len(value))]])
    elif not field.message_type:
        try:
            if repeated:
                at = rng.randrange(len(value))
                value[at] = _scalar(value[at], field, rng)
            else:
                setattr(message, field.name, _scalar(value, field, rng))
        except (ValueError, TypeError):  # outside the field's type
            message.ClearField(field.name)


def _scalar(value: Any, field: FieldDescriptor, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        return bytes(atheris.Mutate(value, len(value) + 64))
    if isinstance(value, str):
        return _any_text(value, rng)
    if field.cpp_type in REALS:
        return rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    return rng.choice((*NUMBERS, value + 1, value - 1))


def json_text(data: bytes, limit: int, seed: int) -> bytes:
    """One value somewhere in a JSON document changed, removed, or put in another's place."""
    rng = random.Random(seed)
    try:
        document = json.loads(data) if rng.random() < 0.5 else None
    except (ValueError, RecursionError):
        document = None
    places = _places(document)
    if places:
        owner, key = rng.choice(places)
        what = rng.randrange(5)
        other, from_key = rng.choice(places)
        if what == 0:
            del owner[key]
        elif what == 1:
            owner[key] = copy.deepcopy(other[from_key])
        elif what == 2 and isinstance(owner, dict):
            owner[_any_text(str(key), rng)] = owner.pop(key)
        elif isinstance(owner[key], str):
            owner[key] = _any_text(owner[key], rng)
        else:
            number = owner[key] if isinstance(owner[key], int) else 0
            owner[key] = rng.choice((*NUMBERS, number + 1, number - 1, 0.5, None, True, "", [], {}))
        changed = json.dumps(document, separators=(",", ":")).encode()
        if len(changed) <= limit:
            return changed
    return bytes(atheris.Mutate(data, limit))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found, pending = [], [value]
    while pending:
        at = pending.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        found += [(at, key) for key in keys]
        pending += [at[key] for key in keys]
    return found


def _any_text(text: str, rng: random.Random) -> str:
    given = text.encode("utf-8", "surrogatepass")
    # Some of it cannot be encoded again: half of a surrogate pair, as JSON may hold.
    return atheris.Mutate(given, len(given) + 32).decode("utf-8", rng.choice(("ignore", "surrogateescape")))


MUTATORS: dict[str, Mutator] = {
    "manifest": json_text,
    "fields": json_text,
    "codebooks": safetensors,
    "onnx": protobuf,
    "triton": protobuf,
}

"""Streamed readers of traffic: JSONL, plain text, stdin. Never a whole file in memory.

A reader yields pieces of text; a piece may end its document. Bytes are counted and hashed as they pass.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from gsrq_export.errors import GsrqError
from gsrq_export.recipe import JsonlSource, StdinSource, TextSource
from gsrq_export.stages.storage import disk_errors, write_atomic

SEPARATOR = "\x1e"  # a line that holds only this ends a document
PIECE_BYTES = 1 << 16  # longest run of text handed on at once
MAX_ROW_BYTES = 64 << 20
BAD_ROWS_SHOWN = 5

Format = Literal["text", "jsonl"]
FileSource = JsonlSource | TextSource | StdinSource


class Piece(NamedTuple):
    text: str
    ends_document: bool


@dataclass
class Tally:
    """What has been read so far. ``digest`` is over the bytes of the files in the order read."""

    size: int = 0  # bytes
    documents: int = 0
    files: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.digest.update(chunk)


@dataclass(frozen=True)
class Stream:
    """One file or stdin, and how to open it."""

    name: str
    format: Format
    path: Path | None  # none: stdin

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self.path is None:
            yield sys.stdin.buffer
            return
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise GsrqError(
                f"traffic file {self.name} cannot be read: {error.strerror}", "correct the path or its permissions"
            ) from None
        with file:
            yield file


def streams_of(source: FileSource) -> list[Stream]:
    """The files of a source, sorted by name.

    Raises:
        GsrqError: the path or glob matches no file.
    """
    if isinstance(source, StdinSource):
        return [Stream("stdin", source.format, None)]
    found = [source.path] if Path(source.path).exists() else sorted(glob.glob(source.path, recursive=True))  # noqa: PTH207
    files = [Path(f) for f in found if Path(f).is_file()]
    if not files:
        what = "is a directory" if Path(source.path).is_dir() else "names no file"
        raise GsrqError(
            f"traffic source {source.kind}: path {source.path!r} {what}", "give a file, or a glob such as texts/*.txt"
        )
    return [Stream(str(f), source.kind, f) for f in files]


def read_pieces(stream: Stream, tokenizer: Any, tally: Tally) -> Iterator[Piece]:
    """Pieces of one stream in order.

    Args:
        tokenizer: its chat template renders rows of messages.
    Raises:
        GsrqError: invalid UTF-8, malformed rows (the first few of the file, with line numbers), or no text at all.
    """
    before = tally.documents
    tally.files += 1
    with stream.open() as file:
        read = read_text if stream.format == "text" else read_jsonl
        for piece in read(file, stream.name, tokenizer, tally):
            tally.documents += piece.ends_document
            yield piece
    if tally.documents == before:
        raise GsrqError(f"traffic {stream.name} is empty: no text in it", "give a file with text")


def read_text(file: BinaryIO, name: str, tokenizer: Any, tally: Tally) -> Iterator[Piece]:
    """Documents of plain text, separated by lines that hold only U+001E."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    held: list[str] = []
    size, line = 0, 1
    inside = False  # the current document has text that was handed on
    fresh = True  # the next chunk begins a line

    def invalid(error: UnicodeDecodeError) -> GsrqError:
        return GsrqError(
            f"{name}:{line}: not UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x})",
            "convert the file to UTF-8",
        )

    while chunk := file.readline(PIECE_BYTES):
        tally.add(chunk)
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise invalid(error) from None
        if line == 1 and fresh:
            text = text.removeprefix("\ufeff")
        if fresh and text.strip("\r\n") == SEPARATOR:
            if inside or "".join(held).strip():
                yield Piece("".join(held), True)
            held, size, inside = [], 0, False
        else:
            held.append(text)
            size += len(chunk)
            if size >= PIECE_BYTES:
                body, rest = cut_at_space("".join(held))
                if body.strip() or inside:
                    yield Piece(body, False)
                    inside = True
                held, size = ([rest] if rest else []), len(rest.encode())
        fresh = chunk.endswith(b"\n")
        line += fresh
    try:
        held.append(decoder.decode(b"", True))
    except UnicodeDecodeError as error:
        raise invalid(error) from None
    if inside or "".join(held).strip():
        yield Piece("".join(held), True)


def cut_at_space(text: str) -> tuple[str, str]:
    """Cut before the last white space of the second half, so that words stay whole; else nowhere."""
    at = max(text.rfind(" "), text.rfind("\n"))
    return (text[:at], text[at:]) if at > len(text) // 2 else (text, "")


def read_jsonl(file: BinaryIO, name: str, tokenizer: Any, tally: Tally) -> Iterator[Piece]:
    """Rows of {"text"}, {"prompt"} (and "completion") or {"messages"}; one document a row."""
    bad: list[str] = []
    number = 0
    while row := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        tally.add(row)
        try:
            if len(row) > MAX_ROW_BYTES:
                while row and not row.endswith(b"\n"):
                    row = file.readline(MAX_ROW_BYTES)
                    tally.add(row)
                raise ValueError(f"the row has over {MAX_ROW_BYTES >> 20} MiB")
            if number == 1:
                row = row.removeprefix(codecs.BOM_UTF8)
            if not row.strip():
                continue
            text = row_text(row, tokenizer)
        except (ValueError, RecursionError) as error:
            bad.append(f"{name}:{number}: {error if str(error) else 'nested too deeply'}")
            if len(bad) == BAD_ROWS_SHOWN:
                break
            continue
        if not bad:
            yield from _document(text)
    if bad:
        at_least = "at least " if len(bad) == BAD_ROWS_SHOWN else ""
        raise GsrqError(
            f"{name}: {at_least}{len(bad)} malformed rows:\n  " + "\n  ".join(bad),
            'each line must be one JSON object with "text", "prompt" or "messages"; correct or remove these',
        )


def row_text(row: bytes, tokenizer: Any) -> str:
    """The text of a JSONL row.

    Raises:
        ValueError: what is wrong with the row.
        GsrqError: the tokenizer has no chat template for a row of messages.
    """
    try:
        data = json.loads(row.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(data, dict):
        raise ValueError(f"holds {type(data).__name__}, not an object")
    kinds = [k for k in ("text", "prompt", "messages") if k in data]
    if len(kinds) != 1:
        what = f"keys {', '.join(sorted(map(repr, data))[:8])}" if not kinds else f"both {' and '.join(kinds)}"
        raise ValueError(f'{what}; need exactly one of "text", "prompt", "messages"')
    if kinds == ["messages"]:
        text = _render(data["messages"], tokenizer)
    else:
        text = _string(data, kinds[0])
        if kinds == ["prompt"] and "completion" in data:
            text += _string(data, "completion")
    if not text.strip():
        raise ValueError(f'"{kinds[0]}" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"an unpaired surrogate \\u{ord(text[error.start]):04x} in it is no text") from None
    return text


def _string(data: dict[str, Any], key: str) -> str:
    if not isinstance(data[key], str):
        raise ValueError(f'"{key}" is {type(data[key]).__name__}, not a string')
    return str(data[key])


def _render(messages: Any, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list with messages in it')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f'messages[{i}] needs "role" and "content", both strings')
    if not getattr(tokenizer, "chat_template", None):
        raise GsrqError(
            "traffic has rows of messages, but the model's tokenizer has no chat template",
            'give rows of {"prompt"} or {"text"}, or a model with a chat template',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template refuses the messages: {error}") from None


def _document(text: str) -> Iterator[Piece]:
    while len(text) > PIECE_BYTES:
        body, _ = cut_at_space(text[:PIECE_BYTES])
        yield Piece(body, False)
        text = text[len(body) :]
    yield Piece(text, True)


def spool_stdin(source: StdinSource, directory: Path, stream: BinaryIO | None = None) -> JsonlSource | TextSource:
    """Copy stdin to a file named by its content, so that a build that is started again can go on without it.

    Raises:
        GsrqError: stdin is a terminal or empty, or the directory cannot be written.
    """
    stream = stream or sys.stdin.buffer
    if stream.isatty():
        raise GsrqError("traffic source stdin: standard input is a terminal", "pipe text into the command")
    tally = Tally()

    def copy(path: Path) -> None:
        with path.open("wb") as file:
            while chunk := stream.read(1 << 20):
                tally.add(chunk)
                file.write(chunk)

    with disk_errors("copy of stdin", directory):
        whole = directory / "stdin.spool"
        write_atomic(whole, copy)
        if not tally.size:
            whole.unlink()
            raise GsrqError("traffic source stdin is empty", "pipe text into the command")
        kept = directory / f"stdin-{tally.digest.hexdigest()[:12]}.{source.format}"
        whole.replace(kept)
    kind: Callable[..., Any] = TextSource if source.format == "text" else JsonlSource
    made: JsonlSource | TextSource = kind(kind=source.format, path=str(kept), share=source.share)
    return made

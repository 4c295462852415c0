"""Readers: what they yield, whatever the sizes, and what they refuse."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from gsrq_export.errors import GsrqError
from gsrq_export.recipe import JsonlSource, StdinSource, TextSource
from gsrq_export.traffic import sources
from gsrq_export.traffic.sources import Stream, Tally, read_pieces, spool_stdin, streams_of


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def documents(path: Path, kind: Any, tokenizer: Any = None) -> tuple[list[str], Tally]:
    tally = Tally()
    found, text = [], ""
    for piece in read_pieces(Stream(str(path), kind, path), tokenizer, tally):
        text += piece.text
        if piece.ends_document:
            found.append(text)
            text = ""
    assert not text
    return found, tally


def error(path: Path, kind: Any, tokenizer: Any = None) -> str:
    with pytest.raises(GsrqError) as caught:
        documents(path, kind, tokenizer)
    return str(caught.value)


@pytest.mark.parametrize("piece_bytes", [7, 64, 1 << 16])
def test_text_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
    wanted = ["Où est l'été?\nIci.\n", "x" * 300, "two\n\nlines 漢字 \x1e inside\n\x1eno\n", "last"]
    content = "\x1e\n" + "\x1e\n".join(d if d.endswith("\n") else d + "\n" for d in wanted) + "\x1e\n\n\x1e\r\n"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    found, tally = documents(path, "text")
    assert [f.rstrip("\n") for f in found] == [w.rstrip("\n") for w in wanted]
    assert tally.documents == 4
    assert tally.digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tally.size == path.stat().st_size


def test_text_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nline \xff\n")
    assert f"{path}:2: not UTF-8: invalid start byte (byte 0xff)" in error(path, "text")
    path.write_bytes("good\né".encode()[:-1])
    assert f"{path}:2: not UTF-8" in error(path, "text")
    path.write_bytes(b" \n\x1e\n\n")
    assert "is empty" in error(path, "text")


def test_jsonl_rows(tmp_path: Path) -> None:
    rows = [{"text": "a b", "id": 4}, {"prompt": "p"}, {"prompt": "p ", "completion": "c"}, {"text": "é" * 100_000}]
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in rows))
    found, _ = documents(path, "jsonl")
    assert found == ["a b", "p", "p c", "é" * 100_000]


def test_jsonl_messages_go_through_the_chat_template(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n')
    assert "no chat template" in error(path, "jsonl", tiny_tokenizer)
    tiny_tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert documents(path, "jsonl", tiny_tokenizer)[0] == ["<user>hi<assistant>yo"]
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "a.jsonl:1: the chat template refuses the messages: roles must alternate" in error(
        path, "jsonl", tiny_tokenizer
    )


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"{", "not JSON"),
        (b"[1]", "holds list, not an object"),
        (b'{"txt": "a"}', "keys 'txt'; need exactly one of"),
        (b'{"text": "a", "prompt": "b"}', "both text and prompt"),
        (b'{"text": 3}', '"text" is int, not a string'),
        (b'{"prompt": "a", "completion": null}', '"completion" is NoneType'),
        (b'{"text": " "}', '"text" is empty'),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "a\\ud800"}', "unpaired surrogate \\ud800"),
        (b'{"messages": []}', '"messages" is not a list with'),
        (b'{"messages": [{"role": "user"}]}', 'messages[0] needs "role" and "content"'),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: bytes, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + row + b"\n")
    found = error(path, "jsonl")
    assert f"{path}:3: " in found
    # How deep the JSON parser can go, and how it says so, is Python's.
    assert what in found or what == "nested too deeply"


def test_first_bad_rows_together_and_long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{}", '{"text": "a"}'] * 9))
    found = error(path, "jsonl")
    assert "at least 5 malformed rows" in found
    assert [f"a.jsonl:{n}:" in found for n in (1, 3, 5, 7, 9, 11)] == [True] * 5 + [False]
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1 << 20)
    path.write_text('{"text": "' + "a" * (3 << 20) + '"}\n{"text": 1}\n')
    found = error(path, "jsonl")
    assert "a.jsonl:1: the row has over 1 MiB" in found
    assert "a.jsonl:2:" in found


def test_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    names = [s.name for s in streams_of(TextSource(kind="text", path=f"{tmp_path}/*.txt"))]
    assert names == [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    with pytest.raises(GsrqError, match=r"path '.*none.jsonl' names no file"):
        streams_of(JsonlSource(kind="jsonl", path=f"{tmp_path}/none.jsonl"))
    with pytest.raises(GsrqError, match="is a directory"):
        streams_of(TextSource(kind="text", path=str(tmp_path)))


def test_stdin_is_spooled(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n'
    kept = spool_stdin(StdinSource(kind="stdin", format="jsonl", share=2), tmp_path, io.BytesIO(content))
    assert isinstance(kept, JsonlSource)
    assert kept.share == 2
    assert Path(kept.path).read_bytes() == content
    assert hashlib.sha256(content).hexdigest()[:12] in kept.path
    with pytest.raises(GsrqError, match="stdin is empty"):
        spool_stdin(StdinSource(kind="stdin"), tmp_path, io.BytesIO())
    assert [f.name for f in tmp_path.iterdir()] == [Path(kept.path).name]

"""Text to token sequences of one length, drawn from the whole of a stream with bounded memory.

The stream is cut into stretches of some multiple of a sequence; a reservoir keeps as many as sequences
are wanted, each stretch with equal chance, and only those are tokenised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gsrq_export.errors import GsrqError
from gsrq_export.traffic.recall_passages import Ids, encode
from gsrq_export.traffic.sources import Piece

STRETCH_BYTES = 32  # a token; text has about 4, so a stretch holds several sequences

Stretch = list[Piece]


def stretches(pieces: Iterable[Piece], size: int) -> Iterator[Stretch]:
    """Consecutive stretches of about ``size`` bytes of text; the last may be shorter."""
    held: Stretch = []
    count = 0
    for piece in pieces:
        text = piece.text
        while count + len(text) > size:  # characters: at most as many as bytes
            at = size - count
            space = max(text.rfind(" ", at // 2, at), text.rfind("\n", at // 2, at))
            at = space if space > 0 else at
            yield [*held, Piece(text[:at], False)]
            held, count, text = [], 0, text[at:]
        held.append(Piece(text, piece.ends_document))
        count += len(text) + 1
        if count >= size:
            yield held
            held, count = [], 0
    if held:
        yield held


def reservoir(items: Iterable[Stretch], keep: int, rng: np.random.Generator) -> tuple[list[Stretch], int]:
    """``keep`` of the items, each subset with equal chance, in their order; and how many there were."""
    kept: list[tuple[int, Stretch]] = []
    seen = 0
    for item in items:
        if seen < keep:
            kept.append((seen, item))
        elif (slot := int(rng.integers(0, seen + 1))) < keep:
            kept[slot] = (seen, item)
        seen += 1
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])], seen


def starts_with_bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does: sequences then start with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer.encode("a")
    return int(bos) if bos is not None and ids[:1] == [bos] else None


def tokenize(stretch: Stretch, tokenizer: Any) -> Ids:
    """Tokens of a stretch, each document followed by the end-of-text token (a blank line if there is none)."""
    eos = tokenizer.eos_token_id
    end = np.asarray([eos], dtype=np.int64) if eos is not None else encode(tokenizer, "\n\n")
    parts: list[Ids] = []
    text = ""
    for piece in stretch:
        text += piece.text
        if piece.ends_document:
            parts += [encode(tokenizer, text), end]
            text = ""
    parts.append(encode(tokenizer, text) if text else np.empty(0, np.int64))
    return np.concatenate(parts)


def draw_sequences(
    pieces: Iterable[Piece], tokenizer: Any, count: int, length: int, rng: np.random.Generator, name: str
) -> Ids:
    """``count`` token sequences of exactly ``length`` tokens from all over the text; int64 [count, length].

    Raises:
        GsrqError: the text makes fewer; says how many.
    """
    bos = starts_with_bos(tokenizer)
    body = length - (bos is not None)
    kept, seen = reservoir(stretches(pieces, STRETCH_BYTES * length), count, rng)
    if seen <= count:  # all of the text is at hand: one stream wastes none of it
        runs = [tokenize([piece for stretch in kept for piece in stretch], tokenizer)]
    else:
        runs = [tokenize(stretch, tokenizer) for stretch in kept]
    windows: list[list[Ids]] = []
    for run in runs:
        phase = int(rng.integers(0, len(run) % body + 1))
        cut = [run[i : i + body] for i in range(phase, len(run) - body + 1, body)]
        windows.append([cut[i] for i in rng.permutation(len(cut))])
    # One sequence of each stretch first, then second ones where some stretch had none.
    order = [
        w for turn in range(max(map(len, windows), default=0)) for w in (x[turn] for x in windows if turn < len(x))
    ]
    if len(order) < count:
        tokens = sum(map(len, runs))
        raise GsrqError(
            f"traffic {name}: {tokens} tokens make {len(order)} sequences of {length}, {count} are wanted",
            f"give more text, or lower traffic.sequences to {len(order)}"
            if order
            else f"give at least {count * length} tokens of text, or lower traffic.sequence_length",
        )
    chosen = np.stack(order[:count])
    return chosen if bos is None else np.concatenate([np.full((count, 1), bos), chosen], 1)

"""Comparisons of one protocol, kept apart from those of others, and put together where several processes made them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gsrq_export.compare.schema import Comparison, Protocol, load_comparison
from gsrq_export.errors import GsrqError


def require_same(wanted: Protocol, found: Protocol, where: str) -> None:
    """Raises GsrqError, naming every field that differs, where rows could not be held against each other."""
    ours, theirs = (dict(_flat(protocol.model_dump())) for protocol in (wanted, found))
    differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differ:
        listed = "; ".join(f"{name} is {theirs.get(name)} there, {ours.get(name)} here" for name in differ[:6])
        raise GsrqError(f"{where} is of another protocol: {listed}", "name another --out, or use the same settings")


def merge(files: Sequence[Path]) -> Comparison:
    """One comparison of several; of a row that stands in more than one of them the first is taken.

    Raises:
        GsrqError: a file is not a comparison, or of another protocol than the first.
    """
    first, *others = [load_comparison(file) for file in files]
    unquantized, rows, skipped = dict(first.unquantized), list(first.rows), list(first.skipped)
    for file, other in zip(files[1:], others, strict=True):
        require_same(first.protocol, other.protocol, str(file))
        unquantized = {**other.unquantized, **unquantized}
        have = {(row.id, row.prefill) for row in rows}
        rows += [row for row in other.rows if (row.id, row.prefill) not in have]
        skipped += [entry for entry in other.skipped if entry.id not in {s.id for s in skipped}]
    done = {row.id for row in rows}
    left = [entry for entry in skipped if entry.id not in done]
    return Comparison(**{**dict(first), "unquantized": unquantized, "rows": rows, "skipped": left})


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _flat(item, f"{name}.{key}" if name else str(key))
    if not isinstance(value, (dict, list)):
        yield name, value

"""Reads the JSON files of this project that people keep and hand on: baselines, comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gsrq_export.errors import GsrqError

Document = TypeVar("Document", bound=BaseModel)


def read_document(
    path: Path, model: type[Document], what: str, kind: str, schema: str, limit: int, mend: str
) -> Document:
    """A checked document.

    Args:
        what: as messages call it, "baseline".
        kind: its field ``kind``, "gsrq regression baseline".
        schema: the version that its field ``schema`` must name.
        limit: bytes at most.
        mend: what to do about a file that is not one.
    Raises:
        GsrqError: not there, too large, truncated, of another kind or schema, or with a field missing or wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise GsrqError(f"{what} {path} is over {limit >> 20} MiB", mend)
        data: Any = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise GsrqError(f"{what} {path}: {error.strerror}", mend) from None
    except (ValueError, RecursionError) as error:
        raise GsrqError(f"{what} {path} is not JSON: {error}", mend) from None
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise GsrqError(f"{what} {path} is not a {kind.removeprefix('gsrq ')}", mend)
    if data.get("schema") != schema:
        raise GsrqError(f"{what} {path} has schema {data.get('schema')!r}, this version reads {schema}", mend)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)[:5]]
        raise GsrqError(
            f"{what} {path} has {error.error_count()} wrong fields:\n  " + "\n  ".join(faults), mend
        ) from None

"""A small real pipeline: text -> blocks compressed in units -> an index over them. Run as a process to be killed."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from pathlib import Path
from typing import Any

from gsrq_export.stages.engine import Context, Pipeline, Stage

BLOCKS = 12


def pipeline(work: Path, seed: int, level: int = 6, pause: float = 0.0, log: list[str] | None = None) -> Pipeline:
    def note(what: str) -> None:
        if log is not None:
            log.append(what)
        time.sleep(pause)

    def text(context: Context) -> None:
        note("text")
        with (context.directory / "text.bin").open("wb") as file:
            for block in range(BLOCKS):
                file.write(hashlib.sha256(f"{seed} {block}".encode()).digest() * 999)
                file.flush()
                time.sleep(pause)

    def compress(context: Context) -> None:
        data = (context.inputs["text"] / "text.bin").read_bytes()
        size = len(data) // BLOCKS
        with context.reporter.task("blocks", BLOCKS) as task:
            for block in range(BLOCKS):

                def write(path: Path, block: int = block) -> None:
                    packed = zlib.compress(data[block * size : (block + 1) * size], level)
                    with path.open("wb") as file:
                        file.write(packed[:50])
                        file.flush()
                        note(f"block {block}")
                        file.write(packed[50:])

                context.unit(f"blocks/{block:02d}.z", write)
                task.advance()

    def index(context: Context) -> None:
        note("index")
        files = sorted((context.inputs["compress"] / "blocks").iterdir())
        sums: Any = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        context.unit("index.json", lambda path: path.write_text(json.dumps(sums)))

    return Pipeline(
        work,
        [
            Stage("text", {"seed": seed}, text),
            Stage("compress", {"level": level}, compress, ("text",)),
            Stage("index", {}, index, ("compress",)),
        ],
    )


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory but the lock's."""
    return {
        f.relative_to(root).as_posix(): f.read_bytes()
        for f in sorted(root.rglob("*"))
        if f.is_file() and not f.relative_to(root).as_posix().startswith(".")
    }

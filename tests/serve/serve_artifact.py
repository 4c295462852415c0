"""The demo model with random codebooks as an artifact with its tokenizer: small, and its text streams."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from demo import demo, demo_directory
from tiny_artifact import export

from gsrq_export import CacheRule
from gsrq_export.runtime.generate import Generation, Sampling, load_eos, load_tokenizer
from gsrq_export.runtime.session import OrtModel

MAX_LENGTH = 320
TEXT = "the old man walked slowly through a dark wood and she said nothing of what had been seen there before"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(3 + 5 * i)) for i in range(32)]


@lru_cache
def served_artifact() -> Path:
    path = Path(tempfile.mkdtemp(prefix="gsrq-serve-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    export(demo()[0], path, CacheRule(4, 16, 16), max_length=MAX_LENGTH)
    (path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copyfile(demo_directory() / name, path / "tokenizer" / name)
    return path


@lru_cache
def _model() -> OrtModel:
    return OrtModel(served_artifact(), 1)


@lru_cache
def generated(prompt: str, most: int, sampling: Sampling | None = None) -> tuple[str, tuple[int, ...], str | None]:
    """What `gsrq generate` gives: (text, new tokens, stop)."""
    path = served_artifact()
    run = Generation(_model(), load_tokenizer(path), prompt, max_new_tokens=most, sampling=sampling, eos=load_eos(path))
    text = "".join(run)
    return text, tuple(run.new_tokens), run.stop

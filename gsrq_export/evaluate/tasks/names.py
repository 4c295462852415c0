"""The tasks' names, for recipes and commands that only name them."""

from __future__ import annotations

from typing import Literal

TaskName = Literal["multi-key", "multi-value", "multi-query", "variable-tracing", "common-words"]

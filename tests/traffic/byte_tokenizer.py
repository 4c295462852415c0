"""The package's tokenizer of one token a byte, under the name that tests know."""

from __future__ import annotations

from gsrq_export.model.byte_tokenizer import byte_tokenizer

__all__ = ["byte_tokenizer"]

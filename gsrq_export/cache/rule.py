"""The cache rule: which tokens are coded, which stay exact, and where each is stored.

n tokens are in the cache, the newest included. The first ``sinks`` stay exact; tokens leave the
window in blocks of ``block`` and are coded then. This file is the only Python statement of the rule
and of the byte layout; plugins/include/gsrq/layout.h is the only other one, and a test holds them equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

CODEBOOK_SIZE = 256  # one byte a code
CODE_TILE = 8  # rows whose codes of a head lie together where codes are ordered by head

IntOrTensor = TypeVar("IntOrTensor", int, torch.Tensor)


@dataclass(frozen=True)
class CacheRule:
    """Sinks S, window W and block P, in tokens."""

    sinks: int = 4
    window: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 0 or self.block < 1:
            raise ValueError(f"need sinks >= 0, window >= 0, block >= 1; got {self}")

    @property
    def ring(self) -> int:
        """Slots of the ring that holds the newest exact tokens."""
        return self.window + self.block

    @property
    def exact_slots(self) -> int:
        """Slots of the exact buffer: the sinks, then the ring."""
        return self.sinks + self.ring

    def coded(self, n: IntOrTensor) -> IntOrTensor:
        """Tokens coded when the cache holds ``n``: tokens sinks .. sinks + coded(n) - 1."""
        full = n - self.sinks - self.window
        if isinstance(full, torch.Tensor):
            return self.block * torch.div(full.clamp(min=0), self.block, rounding_mode="floor")
        return self.block * (max(0, full) // self.block)

    def slot(self, token: torch.Tensor) -> torch.Tensor:
        """Slot of the exact buffer in which a token's key and value lie while they are exact."""
        ring = self.sinks + torch.remainder(token - self.sinks, self.ring)
        return torch.where(token < self.sinks, token, ring)

    def slot_tokens(self, length: torch.Tensor) -> torch.Tensor:
        """The token each slot holds when ``length`` tokens have been appended.

        Args:
            length: int64 [B].
        Returns:
            int64 [B, exact_slots]; -1 where the slot has not been written.
        """
        slot = torch.arange(self.exact_slots, device=length.device)[None]
        last = length[:, None] - 1
        newest = last - torch.remainder(last - slot, self.ring)
        token = torch.where(slot < self.sinks, slot, newest)
        valid = (token <= last) & ((slot < self.sinks) | (token >= self.sinks))
        return torch.where(valid, token, -1)


def code_run(groups: int, stages: int, width: int, head_dim: int, by_head: bool) -> int:
    """Bytes of a token's codes that lie together: all of them, or by head those of a KV head.

    Where a sub-vector spans several heads, those of the heads that share it.
    """
    return max(1, head_dim // width) * stages if by_head else groups * stages


def to_token_order(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Stored codes, row by row.

    Args:
        codes: [..., rows, row bytes], stored as [rows / 8][row bytes / run][8][run], rows a multiple of CODE_TILE; or
            row by row, where ``run`` is all of a row's bytes.
    Returns:
        of the same shape and type; [..., c, :] are row c's codes.
    """
    *outer, rows, row_bytes = codes.shape
    if run == row_bytes:
        return codes
    tiles = codes.reshape(*outer, rows // CODE_TILE, row_bytes // run, CODE_TILE, run)
    return tiles.transpose(-3, -2).reshape(codes.shape)


def from_token_order(codes: torch.Tensor, run: int) -> torch.Tensor:
    """The reverse of to_token_order."""
    *outer, rows, row_bytes = codes.shape
    if run == row_bytes:
        return codes
    tiles = codes.reshape(*outer, rows // CODE_TILE, CODE_TILE, row_bytes // run, run)
    return tiles.transpose(-3, -2).reshape(codes.shape)

"""A mask known only as a function: Dynamo cannot read it, so its blocks are counted pair by pair."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import Loader, evaluate
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.types import MaskMod


@dataclasses.dataclass(frozen=True, slots=True)
class OpaqueMask:
    """An ``IndexMask`` and a pointwise ``mask_mod`` that nobody traced; the same interface as ``IndexMask``.

    Its block bounds are exact, at the price of evaluating every pair (Inductor fuses that
    into one reduction; eagerly it needs memory for every pair).

    Attributes:
        known: The part that is known, e.g. causality.
        mask_mod: The part that is not.
    """

    known: IndexMask
    mask_mod: MaskMod

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Captured tensors of the known part."""
        return self.known.buffers

    @property
    def first_key_unaligned(self) -> bool:
        """Nothing is known about where rows start."""
        return True

    @property
    def rescue_blocks(self) -> Literal["none", "first", "all"]:
        """Nothing is known about rows that may not see themselves."""
        return "all"

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """``pairs``, so that a mask is a ``mask_mod``."""
        return self.pairs(b, h, q, kv)

    def pairs(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Both parts, element-wise."""
        return self.known.pairs(b, h, q, kv) & self.mask_mod(b, h, q, kv)

    def at(self, load: Loader, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """Both parts, the known one reading its buffers through ``load``."""
        return evaluate(self.known.expr, load, b, h, q, kv) & self.mask_mod(b, h, q, kv)

    def bounds(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Exact ``(full, some)`` per block, (B, Hq, NQ, NK)."""
        b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1, 1, 1, 1)
        h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1, 1, 1, 1)
        q = torch.arange(grid.q_blocks * grid.block, device=grid.device).view(1, 1, -1, grid.block, 1, 1)
        side = grid.kv_block
        kv = torch.arange(grid.kv_blocks * side, device=grid.device).view(1, 1, 1, 1, -1, side)
        q_exists, kv_exists = q < grid.q_len, kv < grid.kv_len
        allowed = self.pairs(b, h, q.clamp(max=grid.q_len - 1), kv.clamp(max=grid.kv_len - 1))
        full = (allowed | ~q_exists) & kv_exists
        some = allowed & q_exists & kv_exists
        return full.all(-1).all(3), some.any(-1).any(3)

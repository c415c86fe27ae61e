"""Lazy-active classification of query blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: One query block in this many is kept active whatever its breadth. Our choice, PAPER "e.g. every 16th".
LAZY_STRIDE = 16
#: A block less similar than this to its chunk's kept leader is active. Our choice; inert at 1.0, off at -1.0.
REDUNDANCY_THRESHOLD = 0.5


def active_rows(
    pooled_query: Tensor, local_mass: Tensor, text: Tensor, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Which query blocks may fetch keys beyond the always-kept ones.

    Args:
        pooled_query: (B, Hq, NQ, D) block means.
        local_mass: float32 (B, Hq, NQ), estimated mass on sinks and window.
        text: bool (B or 1, 1, NQ), blocks that hold a query of text that is always kept.
        threshold: Breadth under which a block is lazy; None: every block is active.

    Returns:
        ``(active, lazy)``, bool (B, Hq, NQ): lazy blocks are those that look near and
        repeat their neighbours; the kept sub-sample of them is in both.

    Source: PAPER "Query selection": active if breadth > tau_b, or redundancy < tau_r, or
    text. Our choice: queries of a short run between frames (a timestamp) are judged as visual
    ones are, for a block of 128 nearly always holds one. The "nearest earlier kept neighbour" is
    the first block of a chunk of ``LAZY_STRIDE``, which is always kept, so that no row depends on
    another's outcome.
    """
    if threshold is None:
        lazy = torch.zeros_like(local_mass, dtype=torch.bool)
        return ~lazy, lazy
    rows = torch.arange(local_mass.shape[-1], device=local_mass.device)
    leader = rows - rows % LAZY_STRIDE
    direction = F.normalize(pooled_query.float(), dim=-1)
    redundancy = (direction * direction[..., leader, :]).sum(-1)
    lazy = (1.0 - local_mass < threshold) & (redundancy >= REDUNDANCY_THRESHOLD) & ~text
    return ~lazy | (rows == leader), lazy

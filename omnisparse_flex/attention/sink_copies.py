"""Copies of the sink blocks, so that the backward of a block that every query keeps is not one long loop.

The backward walks the query blocks of one key block in one program. A sink is kept by all of them,
so its program alone would take several times as long as all the others side by side. Here the sink
blocks are repeated in front of the keys and query block ``i`` keeps copy ``i % COPIES``; nothing
else changes, and the gradients of the copies add up because the copies are made by differentiable
operators. Source: our choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)

#: Copies of each sink block. A copy's loop is then as long as that of a key block kept by 1/16 of the queries.
COPIES = 16
#: Keys from which the copies are made. Our choice: half of the shortest length at which they were timed.
MIN_KEYS = 4096


class SpreadBlocks(NamedTuple):
    """Keys, values and maps with the copies in front.

    Attributes:
        key: (B, Hkv, added + S, D).
        value: (B, Hkv, added + S, Dv).
        keep: bool (B or 1, Hq or 1, NQ, added / block + NK).
        full: The same for blocks without a mask.
    """

    key: Tensor
    value: Tensor
    keep: Tensor
    full: Tensor


def spread_first_blocks(
    key: Tensor, value: Tensor, keep: Tensor, full: Tensor, *, count: int, block: int
) -> SpreadBlocks:
    """Repeat the first ``count`` blocks, and let the query blocks share the copies out.

    Args:
        key: (B, Hkv, S, D), S at least ``count * block``.
        value: (B, Hkv, S, Dv).
        keep: bool (B or 1, Hq or 1, NQ, NK).
        full: bool, broadcastable to ``keep``.
        count: Blocks to repeat, at least 1.
        block: Block side, in tokens.

    Returns:
        The same attention over ``COPIES * count * block`` more keys; ``original_position`` finds what a copy is of.
    """
    # Realized: Inductor fails to bound what computes the maps once a concatenation has shifted its index.
    keep, full = (torch.ops.omnisparse.realize(x) for x in (keep, full))
    rows = torch.arange(keep.shape[2], device=keep.device)
    keeps_copy = rows[:, None] % COPIES == torch.arange(COPIES, device=keep.device)  # (NQ, COPIES)
    keeps_copy = keeps_copy.repeat_interleave(count, 1)
    copied = [x[..., :count].repeat(1, 1, 1, COPIES) & keeps_copy for x in (keep, full)]
    is_original = torch.arange(keep.shape[3], device=keep.device) >= count
    tokens = count * block
    return SpreadBlocks(
        torch.cat([key[:, :, :tokens].repeat(1, 1, COPIES, 1), key], 2),
        torch.cat([value[:, :, :tokens].repeat(1, 1, COPIES, 1), value], 2),
        torch.cat([copied[0], keep & is_original], 3),
        torch.cat([copied[1], full & is_original], 3),
    )


def original_position(kv: Tensor, *, count: int, block: int) -> Tensor:
    """The position that a key had before ``spread_first_blocks``; ``count`` = 0: its own."""
    if count == 0:
        return kv
    tokens = count * block
    return torch.where(kv < COPIES * tokens, kv % tokens, kv - COPIES * tokens)

"""Block maps to the block lists of a FlexAttention ``BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.types import MaskMod


def block_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the kept blocks of each row, ascending; what lies behind them is 0.

    Args:
        keep: bool (B, H, NQ, NK).

    Returns:
        int32 (B, H, NQ) and int32 (B, H, NQ, NK).
    """
    count = keep.shape[-1]
    columns = torch.arange(count, device=keep.device, dtype=torch.int32).expand_as(keep)
    # Each kept block's place is the number of kept ones before it; the others share one place past the end.
    place = torch.where(keep, keep.cumsum(-1) - 1, count)
    lists = torch.zeros((*keep.shape[:-1], count + 1), dtype=torch.int32, device=keep.device)
    return keep.sum(-1, dtype=torch.int32), lists.scatter(-1, place, columns)[..., :count]


def block_mask_from_maps(
    keep: Tensor, full: Tensor, mask_mod: MaskMod, lengths: tuple[int, int], block: int, *, transposed: bool
) -> BlockMask:
    """A ``BlockMask`` from a map of kept blocks; never an N x N tensor.

    Args:
        keep: bool (B, H, NQ, NK), blocks to compute.
        full: bool, broadcastable to ``keep``: blocks that run without ``mask_mod``.
        mask_mod: Applied inside the other kept blocks.
        lengths: Numbers of queries and keys.
        block: Block side.
        transposed: Build the key-to-query lists too, which the backward needs.

    Returns:
        A ``BlockMask`` with full and partial blocks in separate lists.
    """
    maps = (keep & ~full, keep & full)
    rows = [_own_buffers(block_lists(x)) for x in maps]
    columns = [_own_buffers(block_lists(x.transpose(-1, -2))) if transposed else (None, None) for x in maps]
    return BlockMask(
        lengths, *rows[0], *rows[1], *columns[0], *columns[1], BLOCK_SIZE=(block, block), mask_mod=mask_mod
    )


def _own_buffers(lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # The kernels find a batch row at H * stride(H), which holds for contiguous lists only; Inductor
    # gives an axis of size 1 any stride it likes, unless the list is a buffer of its own.
    realize = torch.ops.omnisparse.realize
    return realize(lists[0]), realize(lists[1])

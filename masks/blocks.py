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
    partial, complete = keep & ~full, keep & full
    partial_num, partial_idx = _own_lists(partial)
    full_num, full_idx = _own_lists(complete)
    q_num, q_idx = _own_lists(partial.transpose(-1, -2)) if transposed else (None, None)
    full_q_num, full_q_idx = _own_lists(complete.transpose(-1, -2)) if transposed else (None, None)
    return BlockMask(
        lengths,
        kv_num_blocks=partial_num,
        kv_indices=partial_idx,
        full_kv_num_blocks=full_num,
        full_kv_indices=full_idx,
        q_num_blocks=q_num,
        q_indices=q_idx,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_idx,
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
    )


def _own_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """``block_lists`` in buffers of their own."""
    # The kernels find a batch row at H * stride(H), which holds for contiguous lists only; Inductor
    # gives an axis of size 1 any stride it likes, unless the list is realized.
    realize = torch.ops.omnisparse.realize
    number, indices = block_lists(keep)
    return realize(number), realize(indices)

"""Block maps to the block lists of a FlexAttention ``BlockMask``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from omnisparse_flex.kernels.fallback import load
from omnisparse_flex.ops import define
from omnisparse_flex.types import MaskMod

KERNEL = ("block_lists.lists_in_one", "the kernel for block lists failed, they are made in tensor code")
BlockLists = tuple[Tensor, Tensor, Tensor, Tensor]


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


def wider(keep: Tensor, full: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Maps of key blocks ``split`` times as wide.

    Args:
        keep: bool (B, H, NQ, NK), kept blocks.
        full: bool, broadcastable to ``keep``: blocks that run without a mask.
        split: Blocks that become one.

    Returns:
        ``(keep, full)``, both bool (B, H, NQ, NK / ``split``): a block is kept if a part of it is, and full if all
        of it is kept and full. In the others a mask has to tell which part is kept.
    """
    short = -keep.shape[-1] % split
    # In numbers: Inductor's C++ code for padded bool reductions does not compile.
    kept, whole = (x.expand_as(keep).to(torch.uint8) for x in (keep, keep & full))
    parts = [F.pad(x, (0, short)).unflatten(-1, (-1, split)) for x in (kept, whole)]
    return parts[0].amax(-1) > 0, parts[1].amin(-1) > 0


def map_of_lists(counts: Tensor, indices: Tensor, min_width: int = 0) -> Tensor:
    """The inverse of ``block_lists``: bool (B, H, NQ, width), True at the listed blocks.

    Args:
        counts: int (B, H, NQ), how many of each row's indices count.
        indices: int (B, H, NQ, W), below ``width``; what lies behind the count may be anything.
        min_width: ``width`` is W, or this where it is more.
    """
    width = max(indices.shape[-1], min_width)
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    places = torch.where(used, indices.clamp(min=0, max=width - 1), width).long()
    blank = torch.zeros((*indices.shape[:-1], width + 1), dtype=torch.bool, device=indices.device)
    return blank.scatter(-1, places, True)[..., :width]


def block_mask_from_maps(
    keep: Tensor,
    full: Tensor,
    mask_mod: MaskMod,
    lengths: tuple[int, int],
    block: int,
    *,
    transposed: bool,
    key_block: int | None = None,
) -> BlockMask:
    """A ``BlockMask`` from a map of kept blocks; never an N x N tensor.

    Args:
        keep: bool (B or 1, H or 1, NQ, NK), blocks to compute.
        full: bool, broadcastable to ``keep``: blocks that run without ``mask_mod``.
        mask_mod: Applied inside the other kept blocks.
        lengths: Numbers of queries and keys.
        block: Block side.
        transposed: Build the key-to-query lists too, which the backward needs.
        key_block: Side of a key block, if it is another; the backward then does not run on every GPU.

    Returns:
        A ``BlockMask`` with full and partial blocks in separate lists.
    """
    # One opaque operator: every layer has lists of its own, and Inductor would lower what makes them in every layer.
    lists = torch.ops.omnisparse.map_lists
    partial_num, partial_idx, full_num, full_idx = lists(keep, full)
    q_num, q_idx, full_q_num, full_q_idx = (
        lists(keep.transpose(-1, -2), full.transpose(-1, -2)) if transposed else (None, None, None, None)
    )
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
        BLOCK_SIZE=(block, key_block or block),
        mask_mod=mask_mod,
    )


def _map_lists(keep: Tensor, full: Tensor) -> BlockLists:
    full = full.expand_as(keep)
    if keep.is_cuda and (kernel := load(*KERNEL)) is not None:
        made: BlockLists | None = kernel(keep, full)
        if made is not None:
            return made
    lists = (*block_lists(keep & ~full), *block_lists(keep & full))
    # Not ``contiguous``: a dimension of 1 would keep a foreign stride, and the flex kernels read by it.
    number, indices, full_number, full_indices = (x.clone(memory_format=torch.contiguous_format) for x in lists)
    return number, indices, full_number, full_indices


def _fake_lists(keep: Tensor, full: Tensor) -> BlockLists:
    numbers = keep.new_empty(keep.shape[:-1], dtype=torch.int32)
    indices = keep.new_empty(keep.shape, dtype=torch.int32)
    return numbers, indices, torch.empty_like(numbers), torch.empty_like(indices)


# The flex kernels find a batch row at H * stride(H), which holds for contiguous lists only.
define("map_lists(Tensor keep, Tensor full) -> (Tensor, Tensor, Tensor, Tensor)", _map_lists, _fake_lists)

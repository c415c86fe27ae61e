"""``block_lists`` of both maps of a site in one Triton kernel.

A graph holds one call then, where it would hold some twenty operators for Inductor to lower in
every layer. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Blocks of a row that a program looks at together.
TILE = 1024


@triton.jit
def _write(take, places, number, numbers, indices, row, columns):
    """Append the taken places to a row's list, after the ``number`` that it holds; the new number."""
    slots = number + tl.cumsum(take, 0) - 1
    tl.store(indices + row.to(tl.int64) * columns + slots, places, mask=take > 0)
    number += tl.sum(take, 0)
    tl.store(numbers + row, number)
    return number


@triton.jit(do_not_specialize=["rows", "columns"])
def _lists(keep, full, partial_numbers, partial_indices, full_numbers, full_indices, rows, columns, keep_z, keep_h,
           keep_row, keep_column, full_z, full_h, full_row, full_column, TILE: tl.constexpr):  # fmt: skip
    """Both lists of one row: first the kept blocks in order, then zeros."""
    row, h, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    keep += z.to(tl.int64) * keep_z + h.to(tl.int64) * keep_h + row.to(tl.int64) * keep_row
    full += z.to(tl.int64) * full_z + h.to(tl.int64) * full_h + row.to(tl.int64) * full_row
    line = (z * tl.num_programs(1) + h) * rows + row
    some, all_of = 0, 0
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)
        inside = places < columns
        kept = tl.load(keep + places.to(tl.int64) * keep_column, mask=inside, other=0).to(tl.int32)
        is_full = tl.load(full + places.to(tl.int64) * full_column, mask=inside, other=0).to(tl.int32)
        some = _write(kept * (1 - is_full), places, some, partial_numbers, partial_indices, line, columns)
        all_of = _write(kept * is_full, places, all_of, full_numbers, full_indices, line, columns)
    for start in range(0, columns, TILE):
        places = start + tl.arange(0, TILE)
        at = line.to(tl.int64) * columns + places
        zero = tl.zeros((TILE,), tl.int32)
        tl.store(partial_indices + at, zero, mask=(places >= some) & (places < columns))
        tl.store(full_indices + at, zero, mask=(places >= all_of) & (places < columns))


def lists_in_one(keep: Tensor, full: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``torch.ops.omnisparse.map_lists`` says, in one launch.

    Args:
        keep: bool (B, H, NQ, NK), of any strides.
        full: bool, of keep's shape and any strides.

    Returns:
        Numbers and indices of the partial blocks, and of the full blocks.
    """
    batch, heads, rows, columns = keep.shape
    numbers = [torch.empty((batch, heads, rows), dtype=torch.int32, device=keep.device) for _ in range(2)]
    indices = [torch.empty(keep.shape, dtype=torch.int32, device=keep.device) for _ in range(2)]
    _lists[(rows, heads, batch)](
        keep.view(torch.uint8), full.view(torch.uint8), numbers[0], indices[0], numbers[1], indices[1], rows, columns,
        *keep.stride(), *full.stride(), TILE=TILE,
    )  # fmt: skip
    return numbers[0], indices[0], numbers[1], indices[1]

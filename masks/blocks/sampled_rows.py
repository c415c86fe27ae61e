"""Exact attention rows of a few sampled queries per block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.row_mass import Rows, add_rows, key_units, normalised, row_positions

#: Sampled queries per block. Our choice: 1/16 of the exact logits, as ``antidiagonal``.
PROBES = 8


def probe(
    query: Tensor,
    key: Tensor,
    some: Tensor,
    *,
    scale: float,
    block: int,
    key_block: int,
    adjust: Callable[[Tensor], Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Exact softmax rows of ``PROBES`` queries of each block; those that see no key do not count.

    Args, Returns: see ``Scorer``.

    Source: PAPER "Scores"; sampled exact rows as in SampleAttention and ZipVL, arXiv
    2410.08584. Our choice: evenly spaced within the tokens that the block holds, its last
    one included; one sampled query of every block at a time.
    """
    length = query.shape[2]
    units = key_units(key, key_block, 1)
    held = (length - torch.arange(some.shape[-2], device=query.device) * block).clamp(max=block)
    exist = (held > 0).unsqueeze(1)
    count = min(PROBES, block)
    total = None
    for index in range(count):
        positions = row_positions(((index + 1) * held // count - 1).clamp(min=0), length, block)
        rows = Rows(query.index_select(2, positions.squeeze(1)), positions, exist)
        total = add_rows(total, rows, units, some, scale=scale, adjust=adjust, allowed=allowed)
    assert total is not None  # at least one probe
    return normalised(total, some)

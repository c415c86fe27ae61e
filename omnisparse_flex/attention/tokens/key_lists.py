"""Who attends to whom at token granularity, as the kernels take it: near for all, far a few segments at a time.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.kernels.attend_lists import KeyLists
from omnisparse_flex.kernels.key_lists import list_keys
from omnisparse_flex.masks.blocks.block_lists import block_lists
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.causal_padding import CausalPaddingMask
from omnisparse_flex.masks.tokens.chunks import segments_per_chunk
from omnisparse_flex.masks.tokens.segments import SegmentLayout
from omnisparse_flex.masks.tokens.select import TokenSelection, list_width


def near_lists(segments: SegmentLayout, shape: torch.Size, segment: int, mask: CausalPaddingMask) -> KeyLists:
    """All rows over their segments' always-kept blocks; ``shape`` is key's, ``real`` of ``mask`` is uint8."""
    count, blocks = block_lists(segments.forced)
    size = (shape[0], shape[1], -1)
    return KeyLists(None, None, blocks.expand(*size, -1), count.expand(*size), BLOCK, segment, mask.offset, mask.real)


def far_lists(
    selection: TokenSelection, near: KeyLists, config: OmniSparseConfig, key: Tensor, share: int
) -> Iterator[KeyLists]:
    """The active rows over the chosen keys.

    Args:
        selection: Of some or all batch rows and KV heads.
        near: Of the same, for its mask.
        config: Rules.
        key: (B, Hkv, S, D), of all.
        share: The lists take the keys' and values' bytes / ``share``.

    Yields:
        Some segments' lists. The next ones are written over them.
    """
    (*heads, count, _), width = selection.rows.shape, list_width(config, key.shape[2])
    step = segments_per_chunk(count, 4 * heads[0] * heads[1] * width, key, share)
    keys = torch.empty((*heads, step, width), dtype=torch.int32, device=key.device)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        list_keys(selection.chosen, part, keys)
        yield near._replace(
            rows=selection.rows, row_count=selection.row_count, keys=keys[:, :, : part.stop - first],
            key_count=selection.key_count[:, :, part], unit=1, first=first,
        )  # fmt: skip

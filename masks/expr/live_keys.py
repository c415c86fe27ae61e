"""Keys that a mask's own terms of keys allow: what padding, packing and tables by position leave of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.masks.expr.expr import TRUE
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.masks.expr.terms import keys_allowed, split_terms


def live_keys(mask: IndexMask | OpaqueMask, batch: int, kv_len: int, device: torch.device) -> Tensor | None:
    """Which keys exist as far as no query is asked: what stands for a block of keys is made of these alone.

    Args:
        mask: The model's own mask.
        batch: Batch size.
        kv_len: Number of keys.
        device: Where the result lies.

    Returns:
        bool (B, S); None: nothing in the mask is a matter of keys (and batch rows) alone.
    """
    if not isinstance(mask, IndexMask):
        return None
    terms, _ = split_terms(mask.expr, ("b", "kv"))
    if terms == TRUE:
        return None
    return keys_allowed(terms, mask.buffers, batch, 1, kv_len, device).expand(batch, 1, kv_len)[:, 0]

"""Masks simple enough for kernels of our own: an order of positions, and keys that nobody sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.masks.expr.expr import TRUE, axes, causal_offset, conjuncts, evaluate, plain_load
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask


class CausalPaddingMask(NamedTuple):
    """A query sees every real key up to its own position.

    Attributes:
        offset: int64, 0-d, position of query 0 among the keys; None: no order, every real key is seen.
        real: bool (B, S), keys that exist; None: all.
    """

    offset: Tensor | None
    real: Tensor | None


def as_causal_padding(
    mask: IndexMask | OpaqueMask, batch: int, kv_len: int, device: torch.device
) -> CausalPaddingMask | None:
    """``mask`` as an order and a choice of keys; None if it is anything else.

    Args:
        mask: The model's own mask.
        batch: Batch size.
        kv_len: Number of keys.
        device: Where the result lies.
    """
    if not isinstance(mask, IndexMask):
        return None
    load = plain_load(mask.buffers)
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    zero = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    kv = torch.arange(kv_len, device=device).view(1, 1, 1, -1)
    offset, real = None, None
    for part in (p for p in conjuncts(mask.expr) if p != TRUE):
        position = causal_offset(part)
        if position is not None and offset is None:
            offset = evaluate(position, load, zero, zero, zero, zero).to(torch.int64).reshape(-1)[:1]
        elif axes(part) <= {"b", "kv"}:
            seen = evaluate(part, load, b, zero, zero, kv).to(torch.bool).expand(batch, 1, 1, kv_len)[:, 0, 0]
            real = seen if real is None else real & seen
        else:
            return None
    return CausalPaddingMask(offset, real)

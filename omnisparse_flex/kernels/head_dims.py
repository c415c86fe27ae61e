"""Sums of squares over tokens, where they lie, without a copy of them. Importing this needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Programs that share a head's tokens, and tokens that one takes at a time.
PARTS, TOKENS = 32, 64


@triton.jit(do_not_specialize=["length"])
def _squares(x, sums, x_b, x_h, x_n, length, HEADS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr,
             TOKENS: tl.constexpr):  # fmt: skip
    """Sums of squares over the finite ones of every ``PARTS``-th tile of a head's tokens."""
    part, row = tl.program_id(0), tl.program_id(1)
    start = x + (row // HEADS).to(tl.int64) * x_b + (row % HEADS).to(tl.int64) * x_h
    dims, total = tl.arange(0, DIM), tl.zeros((DIM,), tl.float32)
    for first in range(part * TOKENS, length, PARTS * TOKENS):
        places = first + tl.arange(0, TOKENS)
        at = start + places.to(tl.int64)[:, None] * x_n + dims
        tile = tl.load(at, mask=(places < length)[:, None], other=0.0).to(tl.float32)
        broken = tl.max(tl.where(tl.abs(tile) < float("inf"), 0, 1), 1) > 0
        total += tl.sum(tl.where(broken[:, None], 0.0, tile * tile), 0)
    tl.store(sums + (row * PARTS + part).to(tl.int64) * DIM + dims, total)


def sums_of_squares(x: Tensor) -> Tensor:
    """Sums of squares of finite tokens.

    Args:
        x: (B, H, N, D), last dimension contiguous.

    Returns:
        float32 (B, H, D); summed in a fixed order.
    """
    batch, heads, length, dim = x.shape
    sums = torch.empty((batch, heads, PARTS, dim), dtype=torch.float32, device=x.device)
    _squares[(PARTS, batch * heads)](x, sums, *x.stride()[:3], length, HEADS=heads, DIM=dim, PARTS=PARTS, TOKENS=TOKENS)
    return sums.sum(2)

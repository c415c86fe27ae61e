"""Lazy and active queries in Triton, where the log-sum-exps of near and far keys are known.

Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["q_len", "threshold"])
def _classify(
    query, near_lse, far_lse, text, active, lazy, q_b, q_h, q_n, t_b, q_len, threshold, redundancy,
    HEADS: tl.constexpr, DIM: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Lazy and active queries of one tile."""
    row = tl.program_id(1)
    batch, head = row // HEADS, row % HEADS
    places, dims = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, DIM)
    is_row = places < q_len
    leaders = places - places % STRIDE
    base = query + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    q = tl.load(base + places.to(tl.int64)[:, None] * q_n + dims, mask=is_row[:, None], other=0.0).to(tl.float32)
    leader = tl.load(base + leaders.to(tl.int64)[:, None] * q_n + dims, mask=is_row[:, None], other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12) * tl.maximum(tl.sqrt(tl.sum(leader * leader, 1)), 1e-12)
    cosine = tl.sum(q * leader, 1) / length
    slot = row.to(tl.int64) * q_len + places
    near = tl.load(near_lse + slot, mask=is_row, other=0.0)
    far = tl.load(far_lse + slot, mask=is_row, other=0.0)
    breadth = tl.where(far == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(near - far)))
    is_text = tl.load(text + batch * t_b + places, mask=is_row, other=0) != 0
    is_lazy = (breadth < threshold) & (cosine >= redundancy) & (is_text == 0)
    tl.store(lazy + slot, is_lazy.to(tl.uint8), mask=is_row)
    tl.store(active + slot, ((is_lazy == 0) | (places == leaders)).to(tl.uint8), mask=is_row)


def classify(
    query: Tensor, near_lse: Tensor, far_lse: Tensor, text: Tensor, threshold: float, redundancy: float, stride: int
) -> tuple[Tensor, Tensor]:
    """``tokens.active_tokens`` where both log-sum-exps are known.

    Args:
        query: (B, Hq, L, D), last dimension contiguous.
        near_lse: float32 (B, Hq, L) contiguous, of the always-kept keys.
        far_lse: float32 (B, Hq, L) contiguous, of the others.
        text: bool (B or 1, L), last dimension contiguous.
        threshold: Breadth under which a query is lazy.
        redundancy: Cosine with its leader from which a query is redundant.
        stride: Queries that share a leader.

    Returns:
        ``(active, lazy)``, bool (B, Hq, L).
    """
    batch, heads, q_len, dim = query.shape
    active, lazy = (torch.empty((batch, heads, q_len), dtype=torch.uint8, device=query.device) for _ in range(2))
    _classify[(triton.cdiv(q_len, 64), batch * heads)](
        query, near_lse, far_lse, text.view(torch.uint8), active, lazy, *query.stride()[:3],
        text.stride(0) if text.shape[0] > 1 else 0, q_len, threshold, redundancy,
        HEADS=heads, DIM=dim, STRIDE=stride, M=64,
    )  # fmt: skip
    return active.view(torch.bool), lazy.view(torch.bool)

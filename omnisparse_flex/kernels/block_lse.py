"""``block_lse`` in one Triton kernel: products and their exponentials stay in registers.

Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
#: Blocks of keys that a program walks, so that its rows are loaded once for all of them.
STEPS = 8
#: Numbers that change with every prompt: none of them may start a compile.
VARYING = ["kv_len", "blocks", "scale", "r_b", "r_h", "k_b", "k_h"]


def tiles(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows of a tile, warps and stages; fixed, because tuning at run time would cost more than it gains."""
    if dtype == torch.float32:
        return {"M": 16, "num_warps": 4, "num_stages": 1}
    return {"M": 128, "num_warps": 8, "num_stages": 2} if dim <= 128 else {"M": 64, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=VARYING)
def _block_lse(
    rows, key, last, real, out, r_b, r_h, r_n, k_b, k_h, k_n, kv_len, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a KV head's rows, those of all its query heads, over ``STEPS`` blocks of keys."""
    batch, head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS
    slots = tl.program_id(0) * M + tl.arange(0, M)
    is_row = slots < GROUP * ROWS
    q_head, row = head * GROUP + slots // ROWS, slots % ROWS
    dims = tl.arange(0, WIDTH)
    q = tl.load(
        rows + batch.to(tl.int64) * r_b + q_head.to(tl.int64)[:, None] * r_h + row.to(tl.int64)[:, None] * r_n + dims,
        mask=is_row[:, None] & (dims < DIM), other=0.0,
    )  # fmt: skip
    stop = tl.load(last + row, mask=is_row, other=-1).to(tl.int32)
    line = out + ((batch * KV_HEADS * GROUP + q_head).to(tl.int64) * ROWS + row) * blocks
    own_key = key + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    first = tl.program_id(1) * STEPS
    for at in range(first, tl.minimum(first + STEPS, blocks)):
        places = at * BLOCK + tl.arange(0, BLOCK)
        exists = places < kv_len
        k = tl.load(own_key + places.to(tl.int64)[:, None] * k_n + dims, mask=exists[:, None] & (dims < DIM), other=0.0)
        if PADDED:
            exists = exists & (tl.load(real + batch.to(tl.int64) * kv_len + places, mask=exists, other=0) != 0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(exists[None, :] & (places[None, :] <= stop[:, None]), logits, float("-inf"))
        row_max = tl.max(logits, 1)
        safe = tl.where(row_max == float("-inf"), 0.0, row_max)
        total = tl.sum(tl.exp2(logits - safe[:, None]), 1)
        lse = tl.where(total == 0, float("-inf"), (safe + tl.log2(total)) * 0.6931471805599453)
        tl.store(line + at, lse, mask=is_row)


def block_lse_in_one(rows: Tensor, key: Tensor, last: Tensor, real: Tensor | None, scale: float, block: int) -> Tensor:
    """``block_lse`` for D up to 256; the arguments are the same, ``block`` a power of 2 from 16 on."""
    rows, key = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, key))
    batch, heads, count, dim = rows.shape
    kv_heads, kv_len = key.shape[1:3]
    blocks, size = triton.cdiv(kv_len, block), tiles(dim, rows.dtype)
    out = torch.empty((batch, heads, count, blocks), dtype=torch.float32, device=rows.device)
    grid = (triton.cdiv(heads // kv_heads * count, size["M"]), triton.cdiv(blocks, STEPS), batch * kv_heads)
    _block_lse[grid](
        rows, key, last, last if real is None else real.contiguous().view(torch.uint8), out,
        *rows.stride()[:3], *key.stride()[:3], kv_len, blocks, scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, ROWS=count, DIM=dim, WIDTH=max(16, triton.next_power_of_2(dim)),
        BLOCK=block, PADDED=real is not None, STEPS=STEPS,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32", **size,
    )  # fmt: skip
    return out

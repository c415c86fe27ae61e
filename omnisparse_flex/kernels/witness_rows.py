"""One row of every query block against all keys, in Triton: what the peak rule's recall is measured by.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
#: Keys of a split, and of a step.
SPLIT, KEYS = 4096, 64


class Inputs(NamedTuple):
    """What the kernels read; the maps have no head axis.

    Attributes:
        query: (B, Hq, L, D), last dimension contiguous.
        key: (B, Hkv, S, D), last dimension contiguous.
        means: (B, Hkv, NK, D) contiguous, means over key blocks.
        full: bool (B or 1, 1, NQ, NK) contiguous, likewise ``some`` and ``forced``; see ``Layout``.
        places: int32 (B or 1, 1, NQ, 128) contiguous, see ``LiveRows``.
        count: int32 (B or 1, 1, NQ) contiguous.
        base: float32 (B or 1, 1, NQ) contiguous, the highest threshold.
        floor: float32, 0-d.
        real: bool (B, S) contiguous, keys that exist; None: all.
        offset: int64, one element: position of query 0; None: no order, every real key is seen.
    """

    query: Tensor
    key: Tensor
    means: Tensor
    full: Tensor
    some: Tensor
    forced: Tensor
    places: Tensor
    count: Tensor  # type: ignore[assignment]  # tuples have a method of that name
    base: Tensor
    floor: Tensor
    real: Tensor | None
    offset: Tensor | None


@triton.jit
def grown(top, total, logs):
    """A running log-sum-exp with a tile of logits."""
    new = tl.maximum(top, tl.max(logs, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(top - safe) + tl.sum(tl.exp2(logs - safe[:, None]), 1)


@triton.jit(do_not_specialize=["q_b", "q_h", "k_b", "k_h", "places_b", "count_b", "q_blocks", "kv_len", "scale"])
def _witness(
    query, key, places, count, real, offset, out, q_b, q_h, k_b, k_h, places_b, count_b, q_n, k_n, q_blocks, kv_len,
    scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, BN: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
    ORDERED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the witness rows of some query blocks over one split of the keys."""
    SLICES: tl.constexpr = GROUP // HEADS
    EACH: tl.constexpr = M // HEADS
    batch, head = tl.program_id(2) // (KV_HEADS * SLICES), tl.program_id(2) % (KV_HEADS * SLICES)
    kv_head = head // SLICES
    rows, dims, n = tl.arange(0, M), tl.arange(0, WIDTH), tl.arange(0, BN)
    q_b, q_h, k_b, k_h = q_b * ALIGN, q_h * ALIGN, k_b * ALIGN, k_h * ALIGN
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) * EACH + rows // HEADS
    mine = (rows < EACH * HEADS) & (block < q_blocks)
    block = tl.minimum(block, q_blocks - 1)
    own_head = kv_head * GROUP + (head % SLICES) * HEADS + rows % HEADS
    start = tl.load(offset).to(tl.int32)
    live = tl.load(count + batch.to(tl.int64) * count_b + block).to(tl.int32)
    shift = (5 * (block + start // SIZE) + 3 * own_head) % 8
    at = (15 * 8 + shift) * live // SIZE
    place = tl.load(places + batch.to(tl.int64) * places_b + block * SIZE + at).to(tl.int32)
    q = tl.load(
        query + batch.to(tl.int64) * q_b + own_head.to(tl.int64)[:, None] * q_h + place.to(tl.int64)[:, None] * q_n
        + dims, mask=mine[:, None] & (dims < DIM), other=0.0,
    )  # fmt: skip
    stop = tl.where(mine, place + start, -1)
    if not ORDERED:
        stop = tl.where(mine, 2147483647, -1)
    first = tl.program_id(1) * SPLIT
    end = tl.minimum(tl.minimum(first + SPLIT, kv_len), tl.max(stop, 0) + 1)
    own_keys = key + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h + n[None, :] * k_n + dims[:, None]
    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    for step in range(0, tl.cdiv(tl.maximum(end - first, 0), BN)):
        i = first + step * BN
        k_at = i + n
        there = k_at < kv_len
        k = tl.load(own_keys + i.to(tl.int64) * k_n, mask=there[None, :] & (dims[:, None] < DIM), other=0.0)
        if PADDED:
            there = there & (tl.load(real + batch.to(tl.int64) * kv_len + k_at, mask=there, other=0) != 0)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        logits = tl.where(there[None, :] & (k_at[None, :] <= stop[:, None]), logits, float("-inf"))
        top, total = grown(top, total, logits)
    log = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    line = (batch * KV_HEADS * GROUP + own_head).to(tl.int64) * q_blocks + block
    tl.store(out + line * tl.num_programs(1) + tl.program_id(1), log, mask=mine)


def batch_stride(x: Tensor) -> int:
    """The stride of a batch axis that may be 1 for all rows."""
    return x.stride(0) if x.shape[0] > 1 else 0


def witness_logs(
    given: Inputs, offset: Tensor, real: Tensor, strides: tuple[int, ...], scale: float, shapes: dict[str, object]
) -> Tensor:
    """Log-sum-exp to the base 2 of one row of each block over all keys: float32 (B, Hq, NQ)."""
    batch, heads, _, _ = given.query.shape
    q_blocks, kv_len, kv_heads = given.full.shape[2], given.key.shape[2], given.key.shape[1]
    own = int(shapes["HEADS"])  # type: ignore[call-overload]
    rows = 128
    splits = triton.cdiv(kv_len, SPLIT)
    out = torch.full((batch, heads, q_blocks, splits), float("-inf"), dtype=torch.float32, device=given.query.device)
    grid = (triton.cdiv(q_blocks, rows // own), splits, batch * kv_heads * (heads // kv_heads // own))
    _witness[grid](
        given.query, given.key, given.places, given.count, real.view(torch.uint8), offset, out, *strides,
        batch_stride(given.places), batch_stride(given.count), given.query.stride(2), given.key.stride(2),
        q_blocks, kv_len, scale * LOG2_E,
        BN=KEYS, M=rows, SPLIT=SPLIT, **(shapes | {"num_warps": 4}),
    )  # fmt: skip
    total = torch.logsumexp(out * 0.6931471805599453, -1) * LOG2_E
    return total.contiguous()

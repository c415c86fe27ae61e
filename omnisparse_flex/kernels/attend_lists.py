"""Attention of packed query rows over listed keys in Triton.

The kernel loads the listed keys and values directly; there is no gathered copy of them. A program takes one tile of a
segment's rows and walks the segment's key list. All query heads of a KV head's group are rows of one segment, so that
they read each key together. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class KeyLists(NamedTuple):
    """Who attends to whom, by segment of queries.

    Attributes:
        rows: int (B, Hkv, M, R), see ``TokenSelection``; None: all rows of every segment.
        row_count: int64 (B, Hkv, M); None with ``rows``.
        keys: int32 (B, Hkv, m, K), runs of ``unit`` keys: run i holds keys i * unit and on. Strides may be 0.
        key_count: int (B, Hkv, m), runs that count; strides may be 0.
        unit: Keys per run.
        segment: Queries per segment, a multiple of 128.
        offset: int64, position of query 0 where a query sees keys up to its own position; None: it sees all.
        real: uint8 (B, S) contiguous, 0 = a key nobody sees; None: there is none.
        first: The first of the m segments that attend.
    """

    rows: Tensor | None
    row_count: Tensor | None
    keys: Tensor
    key_count: Tensor
    unit: int
    segment: int
    offset: Tensor | None = None
    real: Tensor | None = None
    first: int = 0

    def of(self, rows: slice, heads: slice) -> KeyLists:
        """The lists of some batch rows and KV heads: of one row, or of all heads, so that tensors stay contiguous."""
        return self._replace(
            rows=None if self.rows is None else self.rows[rows, heads],
            row_count=None if self.row_count is None else self.row_count[rows, heads],
            keys=self.keys[rows, heads],
            key_count=self.key_count[rows, heads],
            real=None if self.real is None else self.real[rows],
        )

    def arguments(self, query: Tensor, key: Tensor, value: Tensor, unused: Tensor) -> tuple[Any, ...]:
        """The arguments of every kernel over lists, from ``rows`` on; ``unused`` replaces a missing tensor."""
        tensors = (self.rows, self.row_count, self.keys, self.key_count, self.real, self.offset)
        return (
            *(unused if x is None else x for x in tensors),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *self.keys.stride()[:3],
            *self.key_count.stride(), query.shape[2], key.shape[2], self.first, -(-query.shape[2] // self.segment),
        )  # fmt: skip


def tiles(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and keys of a tile, warps and stages; fixed, because tuning at run time would cost more than it gains."""
    if dtype == torch.float32:
        return {"M": 16, "N": 32, "num_warps": 8, "num_stages": 1}
    if dim <= 128:
        return {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3}
    return {"M": 64, "N": 32, "num_warps": 4, "num_stages": 2}


@triton.jit
def listed_rows(rows, row_count, part, first, m, q_len, M: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr,
                LISTED: tl.constexpr):  # fmt: skip
    """Head in the group, query index and existence of M packed rows from ``first``; ``part`` counts (b, h, m)."""
    slots = first + tl.arange(0, M)
    exists = slots < WIDTH
    if LISTED:
        exists = slots < tl.load(row_count + part)
        slots = tl.load(rows + part.to(tl.int64) * WIDTH + slots, mask=exists, other=0).to(tl.int32)
    place = m * SEGMENT + slots % SEGMENT
    return slots // SEGMENT, place, exists & (place < q_len)


@triton.jit
def listed_keys(keys, real, start, total, kv_len, N: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr):
    """Positions of N listed keys from ``start``, and whether they exist."""
    slots = start + tl.arange(0, N)
    exists = slots < total
    at = tl.load(keys + slots // UNIT, mask=exists, other=0) * UNIT + slots % UNIT
    exists = exists & (at < kv_len)
    if PADDED:
        exists = exists & (tl.load(real + at, mask=exists, other=0) != 0)
    return at, exists


#: Numbers that change with every prompt, and must not start a compile.
VARYING = ["q_len", "kv_len", "scale", "l_b", "l_h", "l_m", "c_b", "c_h", "c_m", "first_segment", "segments"]


@triton.jit(do_not_specialize=VARYING)
def _attend(
    query, key, value, out, lse, rows, row_count, keys, key_count, real, offset,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, l_b, l_h, l_m, c_b, c_h, c_m, q_len, kv_len,
    first_segment, segments, scale, o_b, o_h, o_n,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, GOES_ON: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows over its segment's keys; with ``GOES_ON`` from the softmax that ``out`` and ``lse`` hold."""
    list_index, row = tl.program_id(1), tl.program_id(2)
    batch, head, m = row // KV_HEADS, row % KV_HEADS, first_segment + list_index
    part = row * segments + m
    first = tl.program_id(0) * M
    if LISTED:  # noqa: SIM102
        if first >= tl.load(row_count + part):
            return
    member, place, is_row = listed_rows(rows, row_count, part, first, m, q_len, M, GROUP * SEGMENT, SEGMENT, LISTED)
    q_head = head * GROUP + member
    dims = tl.arange(0, DIM)
    at_q = q_head.to(tl.int64)[:, None] * q_h + place.to(tl.int64)[:, None] * q_n + dims
    q = tl.load(
        query + batch.to(tl.int64) * q_b + at_q,
        mask=is_row[:, None], other=0.0,
    )  # fmt: skip
    slot = (batch * KV_HEADS * GROUP + q_head).to(tl.int64) * q_len + place
    at_out = q_head.to(tl.int64)[:, None] * o_h + place.to(tl.int64)[:, None] * o_n + dims
    target = out + batch.to(tl.int64) * o_b + at_out
    row_max = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DIM), tl.float32)
    if GOES_ON:
        row_max = tl.load(lse + slot, mask=is_row, other=float("-inf")) * 1.4426950408889634
        total = tl.where(row_max == float("-inf"), 0.0, 1.0)
        sums = tl.load(target, mask=is_row[:, None], other=0.0).to(tl.float32)
    last = place
    if CAUSAL:
        last = place + tl.load(offset).to(tl.int32)
    listed = keys + batch.to(tl.int64) * l_b + head.to(tl.int64) * l_h + list_index.to(tl.int64) * l_m
    width = tl.load(key_count + batch * c_b + head * c_h + list_index * c_m).to(tl.int32) * UNIT
    key_of_head = key + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    value_of_head = value + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    for start in range(0, width, N):
        at, exists = listed_keys(listed, real + batch * kv_len, start, width, kv_len, N, UNIT, PADDED)
        k = tl.load(key_of_head + at.to(tl.int64)[:, None] * k_n + dims, mask=exists[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = exists[None, :]
        if CAUSAL:
            seen = seen & (at[None, :] <= last[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        now = tl.maximum(row_max, tl.max(logits, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(row_max - safe)
        total = total * shrink + tl.sum(weights, 1)
        if VALUES:
            v = tl.load(value_of_head + at.to(tl.int64)[:, None] * v_n + dims, mask=exists[:, None], other=0.0)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        row_max = now
    if VALUES:
        share = sums / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(target, share.to(out.dtype.element_ty), mask=is_row[:, None])
    result = tl.where(total == 0, float("-inf"), (row_max + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + slot, result, mask=is_row)


def attend_lists(
    query: Tensor, key: Tensor, value: Tensor | None, out: Tensor | None, lse: Tensor, lists: KeyLists, scale: float,
    *, goes_on: bool = False,
) -> None:  # fmt: skip
    """Attention of the listed rows over the listed keys, into ``out`` and ``lse``; the other rows are left alone.

    Args:
        query: (B, Hq, L, D), last dimension contiguous; D a power of 2 from 16 to 256.
        key: (B, Hkv, S, D), last dimension contiguous.
        value: (B, Hkv, S, D), last dimension contiguous; None: only ``lse`` is wanted.
        out: (B, Hq, L, D), last dimension contiguous, written; None with ``value``.
        lse: float32 (B, Hq, L) contiguous, written: natural log-sum-exp, -inf where a row sees no key.
        lists: Who attends to whom.
        scale: Logit scale.
        goes_on: ``out`` and ``lse`` hold attention over other keys: the result is that over the union.

    Source: PAPER "Lazy + active in one output". Our choice: the merge is the softmax of part 1 continued, so that
    part 2 never exists on its own.
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    width, size = heads // kv_heads * lists.segment, tiles(dim, query.dtype)
    value = key if value is None else value
    _attend[(triton.cdiv(width, size["M"]), lists.key_count.shape[2], batch * kv_heads)](
        query, key, value, lse if out is None else out, lse, *lists.arguments(query, key, value, lse), scale * LOG2_E,
        *(0, 0, 0) if out is None else out.stride()[:3],
        **constants(query, key, lists), VALUES=out is not None, GOES_ON=goes_on, **size,
    )  # fmt: skip


def constants(query: Tensor, key: Tensor, lists: KeyLists) -> dict[str, Any]:
    """What a kernel over ``lists`` is compiled for, tiles aside."""
    return {
        "KV_HEADS": int(key.shape[1]),
        "GROUP": int(query.shape[1]) // int(key.shape[1]),
        "SEGMENT": lists.segment,
        "DIM": int(query.shape[3]),
        "UNIT": lists.unit,
        "LISTED": lists.rows is not None,
        "CAUSAL": lists.offset is not None,
        "PADDED": lists.real is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }

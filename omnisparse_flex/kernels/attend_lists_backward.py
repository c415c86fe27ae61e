"""Gradients of attention over listed keys, in Triton; the counterpart of ``omnisparse_flex/kernels/attend_lists.py``.

Two kernels, as in FlashAttention-2: one owns rows and sums the query's gradient, one owns a
segment's listed keys and sums theirs, which it then adds to those of other segments.
Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnisparse_flex.kernels.attend_lists import VARYING, KeyLists, constants, listed_keys, listed_rows


def tiles(dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and keys of a tile, warps and stages: for the query's gradient, and for the keys'."""
    if dtype == torch.float32:
        small = {"M": 16, "N": 16, "num_warps": 8, "num_stages": 1}
        return small, small
    if dim <= 128:
        return (
            {"M": 128, "N": 64, "num_warps": 8, "num_stages": 2},
            {"M": 64, "N": 128, "num_warps": 8, "num_stages": 2},
        )
    return {"M": 64, "N": 32, "num_warps": 4, "num_stages": 1}, {"M": 32, "N": 64, "num_warps": 8, "num_stages": 1}


@triton.jit(do_not_specialize=VARYING)
def _of_queries(
    query, key, value, out, grad, lse, delta, grad_query, rows, row_count, keys, key_count, real, offset,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, l_b, l_h, l_m, c_b, c_h, c_m, q_len, kv_len,
    first_segment, segments, scale, g_b, g_h, g_n, o_b, o_h, o_n,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, GOES_ON: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of rows; with ``GOES_ON`` added to what is there, else ``delta`` is written too."""
    list_index, row = tl.program_id(1), tl.program_id(2)
    batch, head, m = row // KV_HEADS, row % KV_HEADS, first_segment + list_index
    part = row * segments + m
    first = tl.program_id(0) * M
    if LISTED:  # noqa: SIM102
        if first >= tl.load(row_count + part):
            return
    member, place, is_row = listed_rows(rows, row_count, part, first, m, q_len, M, GROUP * SEGMENT, SEGMENT, LISTED)
    q_head, dims = head * GROUP + member, tl.arange(0, DIM)
    row_mask = is_row[:, None]
    at_q = q_head.to(tl.int64)[:, None] * q_h + place.to(tl.int64)[:, None] * q_n + dims
    q = tl.load(
        query + batch.to(tl.int64) * q_b + at_q,
        mask=row_mask, other=0.0,
    )  # fmt: skip
    slot = (batch * KV_HEADS * GROUP + q_head).to(tl.int64) * q_len + place
    rowed = batch.to(tl.int64) * o_b + q_head.to(tl.int64)[:, None] * o_h + place.to(tl.int64)[:, None] * o_n + dims
    do = tl.load(
        grad + batch.to(tl.int64) * g_b + q_head.to(tl.int64)[:, None] * g_h + place.to(tl.int64)[:, None] * g_n + dims,
        mask=row_mask, other=0.0,
    )  # fmt: skip
    normal = tl.load(lse + slot, mask=is_row, other=float("-inf")) * 1.4426950408889634
    normal = tl.where(normal == float("-inf"), float("inf"), normal)
    if GOES_ON:
        inner = tl.load(delta + slot, mask=is_row, other=0.0)
        total = tl.load(grad_query + rowed, mask=row_mask, other=0.0).to(tl.float32)
    else:
        o = tl.load(out + rowed, mask=row_mask, other=0.0)
        tl.debug_barrier()  # the gradient may go where ``out`` is
        inner = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + slot, inner, mask=is_row)
        total = tl.zeros((M, DIM), tl.float32)
    last = place
    if CAUSAL:
        last = place + tl.load(offset).to(tl.int32)
    listed = keys + batch.to(tl.int64) * l_b + head.to(tl.int64) * l_h + list_index.to(tl.int64) * l_m
    width = tl.load(key_count + batch * c_b + head * c_h + list_index * c_m).to(tl.int32) * UNIT
    key_of_head = key + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    value_of_head = value + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    sums = tl.zeros((M, DIM), tl.float32)
    for start in range(0, width, N):
        at, exists = listed_keys(listed, real + batch * kv_len, start, width, kv_len, N, UNIT, PADDED)
        k = tl.load(key_of_head + at.to(tl.int64)[:, None] * k_n + dims, mask=exists[:, None], other=0.0)
        v = tl.load(value_of_head + at.to(tl.int64)[:, None] * v_n + dims, mask=exists[:, None], other=0.0)
        weights = tl.exp2(
            tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634) - normal[:, None]
        )
        seen = exists[None, :]
        if CAUSAL:
            seen = seen & (at[None, :] <= last[:, None])
        change = weights * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - inner[:, None])
        change = tl.where(seen, change, 0.0)
        sums += tl.dot(change.to(k.dtype), k, input_precision=PRECISION)
    tl.store(grad_query + rowed, (total + sums * scale).to(grad_query.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=VARYING)
def _of_keys(
    query, key, value, grad, lse, delta, grad_key, grad_value, rows, row_count, keys, key_count, real, offset,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, l_b, l_h, l_m, c_b, c_h, c_m, q_len, kv_len,
    first_segment, segments, scale, g_b, g_h, g_n,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a segment's listed keys and values."""
    list_index, row, start = tl.program_id(1), tl.program_id(2), tl.program_id(0) * N
    batch, head, m = row // KV_HEADS, row % KV_HEADS, first_segment + list_index
    part = row * segments + m
    width = tl.load(key_count + batch * c_b + head * c_h + list_index * c_m).to(tl.int32) * UNIT
    if start >= width:
        return
    listed = keys + batch.to(tl.int64) * l_b + head.to(tl.int64) * l_h + list_index.to(tl.int64) * l_m
    at, exists = listed_keys(listed, real + batch * kv_len, start, width, kv_len, N, UNIT, PADDED)
    dims = tl.arange(0, DIM)
    key_of_head = key + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    value_of_head = value + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_h
    k = tl.load(key_of_head + at.to(tl.int64)[:, None] * k_n + dims, mask=exists[:, None], other=0.0)
    v = tl.load(value_of_head + at.to(tl.int64)[:, None] * v_n + dims, mask=exists[:, None], other=0.0)
    shift = 0
    if CAUSAL:
        shift = tl.load(offset).to(tl.int32)
    count = GROUP * SEGMENT
    if LISTED:
        count = tl.load(row_count + part).to(tl.int32)
    key_sums, value_sums = tl.zeros((N, DIM), tl.float32), tl.zeros((N, DIM), tl.float32)
    for first in range(0, count, M):
        member, place, is_row = listed_rows(rows, row_count, part, first, m, q_len, M, GROUP * SEGMENT, SEGMENT, LISTED)
        q_head = head * GROUP + member
        q = tl.load(
            query + batch.to(tl.int64) * q_b + q_head.to(tl.int64)[:, None] * q_h + place.to(tl.int64)[:, None] * q_n
            + dims,
            mask=is_row[:, None], other=0.0,
        )  # fmt: skip
        slot = (batch * KV_HEADS * GROUP + q_head).to(tl.int64) * q_len + place
        do = tl.load(
            grad + batch.to(tl.int64) * g_b + q_head.to(tl.int64)[:, None] * g_h + place.to(tl.int64)[:, None] * g_n
            + dims,
            mask=is_row[:, None], other=0.0,
        )  # fmt: skip
        normal = tl.load(lse + slot, mask=is_row, other=float("-inf")) * 1.4426950408889634
        normal = tl.where(normal == float("-inf"), float("inf"), normal)
        inner = tl.load(delta + slot, mask=is_row, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = exists[:, None] & is_row[None, :]
        if CAUSAL:
            seen = seen & (at[:, None] <= (place + shift)[None, :])
        weights = tl.where(seen, tl.exp2(logits - normal[None, :]), 0.0)
        value_sums += tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
        change = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - inner[None, :])
        key_sums += tl.dot(change.to(q.dtype), q, input_precision=PRECISION)
    placed = (row.to(tl.int64) * kv_len + at)[:, None] * DIM + dims
    tl.atomic_add(grad_key + placed, key_sums * scale, mask=exists[:, None], sem="relaxed")
    tl.atomic_add(grad_value + placed, value_sums, mask=exists[:, None], sem="relaxed")


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, delta: Tensor,
    grad_query: Tensor, parts: Iterable[KeyLists], scale: float,
) -> Tensor:  # fmt: skip
    """Gradients of one softmax over the union of several parts' keys.

    Args:
        grad: (B, Hq, L, D), of the output; last dimension contiguous.
        query: (B, Hq, L, D), last dimension contiguous.
        key: (B, Hkv, S, D), last dimension contiguous.
        value: (B, Hkv, S, D), last dimension contiguous.
        out: (B, Hq, L, D), over all parts; last dimension contiguous.
        lse: float32 (B, Hq, L) contiguous, over all parts.
        delta: float32 (B, Hq, L) contiguous, written: each row's output along its gradient.
        grad_query: (B, Hq, L, D), strides those of ``out``, written: query's gradient. It may be ``out``, which a row
            is read from before its gradient is written.
        parts: Lists that share no pair; the first lists every row.
        scale: Logit scale.

    Returns:
        float32 (2, B, Hkv, S, D), gradients of keys and values. They are summed in no fixed order, so their last bits
        differ from run to run.

    Source: SEAMS: the backward of each part given the merged output and log-sum-exp is the union's.
    """
    (batch, heads, _, dim), kv_heads = query.shape, key.shape[1]
    sums = torch.zeros((2, *key.shape), dtype=torch.float32, device=key.device)
    of_queries, of_keys = tiles(dim, query.dtype)
    for i, lists in enumerate(parts):
        width, segments = heads // kv_heads * lists.segment, lists.key_count.shape[2]
        listed = (*lists.arguments(query, key, value, lse), scale, *grad.stride()[:3])
        fixed = constants(query, key, lists)
        _of_queries[(triton.cdiv(width, of_queries["M"]), segments, batch * kv_heads)](
            query, key, value, out, grad, lse, delta, grad_query, *listed, *out.stride()[:3],
            **fixed, GOES_ON=i > 0, **of_queries,
        )  # fmt: skip
        _of_keys[(triton.cdiv(lists.keys.shape[3] * lists.unit, of_keys["N"]), segments, batch * kv_heads)](
            query, key, value, grad, lse, delta, sums[0], sums[1], *listed, **fixed, **of_keys
        )
    return sums

"""One decoded token over a layer's two rectangles and its tail, in two Triton kernels.

Split-KV decoding: every program takes one run of keys of one KV head, with the head's query
group as the rows of a small matrix product, so that each key is read once; a second kernel
merges the runs by their log-sum-exps. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Programs per GPU multiprocessor that the runs are cut for.
WAVES = 3
#: Keys that a program takes at least, and at a time.
RUN, BLOCK = 256, 64
#: Rows of a matrix product are at least this many.
ROWS = 16
LOG2_E = 1.4426950408889634


#: Numbers that change with every token or prompt: none of them may start a compile.
_VARYING = ["size_0", "size_1", "heads_0", "heads_1", "room", "first", "length", "prefix_runs", "scale"]


@triton.jit(do_not_specialize=_VARYING)
def _runs(
    query, key, value, key_0, value_0, key_1, value_1, tail_key, tail_value, columns, counts, tail, padding, out, lse,
    size_0, size_1, heads_0, heads_1, room, first, length, prefix_runs, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one KV head's group over one run of keys."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch, head, run = row // KV_HEADS, row % KV_HEADS, STEPS * BLOCK
    dims, rows = tl.arange(0, DIM), tl.arange(0, ROWS)
    is_row = (rows < GROUP)[:, None]
    place = rows[:, None] * DIM + dims[None, :]
    q = tl.load(query + row.to(tl.int64) * GROUP * DIM + place, mask=is_row, other=0.0)
    in_tail = part >= prefix_runs
    held = tl.load(tail)  # tokens in the tail; the new one goes behind them
    new_k, new_v = tl.load(key + row * DIM + dims), tl.load(value + row * DIM + dims)
    if in_tail:
        start, stop = (part - prefix_runs) * run, held + 1
        keys = tail_key + row.to(tl.int64) * room * DIM
        values = tail_value + row.to(tl.int64) * room * DIM
    else:
        start, stop = part * run, tl.load(counts + row)
        column = tl.load(columns + head)
        if column < heads_0:
            base = (batch * heads_0 + column).to(tl.int64) * size_0 * DIM
            keys, values = key_0 + base, value_0 + base
        else:
            base = (batch * heads_1 + column - heads_0).to(tl.int64) * size_1 * DIM
            keys, values = key_1 + base, value_1 + base
    stop = tl.minimum(stop, start + run)
    if part == prefix_runs:
        place_new = (row.to(tl.int64) * room + held) * DIM + dims
        tl.store(tail_key + place_new, new_k, mask=(dims < DIM) & (held < room))
        tl.store(tail_value + place_new, new_v, mask=(dims < DIM) & (held < room))
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    for step in range(STEPS):
        slots = start + step * BLOCK + tl.arange(0, BLOCK)
        exists = slots < stop
        if PADDED:
            real = tl.load(padding + batch * length + first + slots, mask=exists & in_tail, other=1)
            exists = exists & (real != 0)
        # The new token is not read where another program is just writing it.
        new = ((slots == held) & in_tail)[:, None]
        offsets = slots[:, None] * DIM + dims[None, :]
        k = tl.load(keys + offsets, mask=exists[:, None] & (new == 0), other=0.0)
        k = tl.where(new, new_k[None, :], k)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(exists[None, :], logits, float("-inf"))
        now = tl.maximum(row_max, tl.max(logits, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(row_max - safe)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + offsets, mask=exists[:, None] & (new == 0), other=0.0)
        v = tl.where(new, new_v[None, :], v)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        row_max = now
    slot = (row * tl.num_programs(1) + part).to(tl.int64) * GROUP
    share = sums / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + slot * DIM + place, share, mask=is_row)
    tl.store(lse + slot + rows, tl.where(total == 0, float("-inf"), row_max + tl.log2(total)), mask=rows < GROUP)


@triton.jit(do_not_specialize=["runs"])
def _merge(
    parts, lse, out, tail, sinks, runs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, RUNS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The runs of one query head and its sink, merged; the tail has grown by one."""
    row, member = tl.program_id(0), tl.program_id(1)
    if (row == 0) & (member == 0):
        tl.store(tail, tl.load(tail) + 1)
    dims, places = tl.arange(0, DIM), tl.arange(0, RUNS)
    exists = places < runs
    slots = (row.to(tl.int64) * runs + places) * GROUP + member
    logs = tl.load(lse + slots, mask=exists, other=float("-inf"))
    row_max = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + (row % KV_HEADS) * GROUP + member).to(tl.float32) * 1.4426950408889634
        row_max = tl.maximum(row_max, sink)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(logs - row_max)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - row_max)
    partial = tl.load(parts + slots[:, None] * DIM + dims[None, :], mask=exists[:, None], other=0.0)
    merged = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + (row.to(tl.int64) * GROUP + member) * DIM + dims, merged.to(out.dtype.element_ty))


def attend_token(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[tuple[Tensor, Tensor]], columns: Tensor, counts: Tensor,
    tail_key: Tensor, tail_value: Tensor, tail: Tensor, first: int, padding: Tensor | None, scale: float,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add one token to a layer's tail, and attend over everything that the layer keeps.

    Nothing of it depends on how many tokens the tail holds, except on the device: the two
    launches can be captured in a CUDA graph and replayed, until the tail is full.

    Args:
        query: (B, Hq, 1, D), contiguous.
        key: (B, Hkv, 1, D), contiguous, the token's own.
        value: (B, Hkv, 1, D), contiguous.
        parts: One or two parts of the kept keys and values, each (B, h, n, D) contiguous.
        columns: int32 (Hkv,), each KV head's place in the parts' heads, one after the other.
        counts: int32 (B, Hkv), keys of each head that count.
        tail_key: (B, Hkv, room, D), written; at least one place is free.
        tail_value: (B, Hkv, room, D), written.
        tail: int32 (1,), tokens in the tail, advanced by one.
        first: Position of the tail's first token.
        padding: uint8 (B, length), contiguous, 0 = no token; or None.
        scale: Logit scale.
        sinks: (Hq,), contiguous, logit of each head's virtual key without a value, or None.

    Returns:
        (B, Hq, 1, D). A query without any key gives 0.
    """
    batch, heads, _, dim = query.shape
    kv_heads, room = tail_key.shape[1], tail_key.shape[2]
    (key_0, value_0), (key_1, value_1) = parts[0], parts[-1]
    longest = max(key_0.shape[2], key_1.shape[2])
    run = _run_length(longest, batch * kv_heads, query.device)
    prefix_runs = triton.cdiv(longest, run)
    runs = prefix_runs + triton.cdiv(room, run)
    group = heads // kv_heads
    partial = query.new_empty(batch * kv_heads, runs, group, dim, dtype=torch.float32)
    lse = query.new_empty(batch * kv_heads, runs, group, dtype=torch.float32)
    out = torch.empty_like(query)
    fixed: dict[str, Any] = {"GROUP": group, "DIM": dim}
    _runs[(batch * kv_heads, runs)](
        query, key, value, key_0, value_0, key_1, value_1,
        tail_key, tail_value, columns, counts, tail,
        query if padding is None else padding, partial, lse,
        key_0.shape[2], key_1.shape[2], key_0.shape[1], key_1.shape[1],
        room, first, 0 if padding is None else padding.shape[1], prefix_runs, scale * LOG2_E,
        KV_HEADS=kv_heads, ROWS=max(ROWS, triton.next_power_of_2(group)), BLOCK=BLOCK, STEPS=run // BLOCK,
        PADDED=padding is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32", **fixed,
    )  # fmt: skip
    _merge[(batch * kv_heads, group)](
        partial, lse, out, tail, lse if sinks is None else sinks, runs,
        KV_HEADS=kv_heads, RUNS=triton.next_power_of_2(runs), SINKS=sinks is not None, **fixed,
    )  # fmt: skip
    return out


def _run_length(longest: int, rows: int, device: torch.device) -> int:
    """Keys per program: enough programs to fill the device, none with too little to do."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    runs_to_fill = triton.cdiv(WAVES * processors, rows)
    # A power of two: a compiled kernel serves many lengths.
    return max(RUN, int(triton.next_power_of_2(triton.cdiv(longest, runs_to_fill))))

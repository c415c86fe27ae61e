"""One-pass column mass in Triton: how much of their attention the active queries of a segment give to each key.

Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnisparse_flex.kernels.attend_lists import LOG2_E, listed_rows
from omnisparse_flex.kernels.pack_keys import FLOAT8_MAX, ReadyKeys

#: Keys of a program of the mass kernel, and rows that it takes at a time.
KEYS, ROWS = 256, 64


@triton.jit(do_not_specialize=["q_len", "scale", "first_segment", "segments"])
def _pack(
    query, guess, rows, row_count, key_gain, columns, packed, gains, guesses, q_b, q_h, q_n, q_len, scale,
    first_segment, segments,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, DIM: tl.constexpr, TOP: tl.constexpr,
    ROWS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Gather one tile of active rows, each scaled to the packed type's range; what is no row weighs nothing."""
    first, chunk_m, row = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    batch, head, m = row // KV_HEADS, row % KV_HEADS, first_segment + chunk_m
    part = row * segments + m
    if first >= tl.load(row_count + part):
        return
    member, place, is_row = listed_rows(rows, row_count, part, first, m, q_len, ROWS, GROUP * SEGMENT, SEGMENT, True)
    q_head, dims = head * GROUP + member, tl.arange(0, DIM)
    at = dims
    if NARROW:
        at = tl.load(columns + row * DIM + dims)
    q = tl.load(
        query + batch.to(tl.int64) * q_b + q_head.to(tl.int64)[:, None] * q_h + place.to(tl.int64)[:, None] * q_n + at,
        mask=is_row[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    normal = tl.load(
        guess + (batch * KV_HEADS * GROUP + q_head).to(tl.int64) * q_len + place, mask=is_row, other=float("inf")
    )
    # What is not finite has no say in the choice; where it is not in these coordinates, the guess is not finite either.
    broken = tl.max(tl.where(tl.abs(q) < float("inf"), 0, 1), 1) > 0
    says = is_row & (broken == 0) & (tl.abs(normal) < float("inf"))
    q = tl.where(says[:, None], q, 0.0)
    peak = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)
    stored = (row * tl.num_programs(1) + chunk_m).to(tl.int64) * GROUP * SEGMENT + first + tl.arange(0, ROWS)
    tl.store(packed + stored[:, None] * DIM + dims, (q * (TOP / peak)[:, None]).to(packed.dtype.element_ty))
    gain = peak / TOP * tl.load(key_gain + row) * scale
    tl.store(gains + stored, tl.where(says, gain, 0.0))
    tl.store(guesses + stored, tl.where(says, normal * 1.4426950408889634, float("inf")))


@triton.jit(
    do_not_specialize=["kv_len", "first_segment", "segments", "first_mass", "masses", "blocks", "e_b", "e_h", "e_m"]
)
def _mass(
    packed, gains, guesses, row_count, keys, state, eligible, mass, k_b, k_h, k_n, e_b, e_h, e_m, blocks, kv_len,
    first_segment, segments, first_mass, masses, BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Mass of some keys for one segment: the program owns its keys, so nothing is added across programs."""
    tile, chunk_m, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head, m = row // KV_HEADS, row % KV_HEADS, first_segment + chunk_m
    chunk_part = (row * tl.num_programs(1) + chunk_m).to(tl.int64)
    places, dims = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, DIM)
    target = mass + (row * masses + first_mass + chunk_m).to(tl.int64) * tl.num_programs(0) * KEYS + places
    block = places // BLOCK
    flags = eligible + batch.to(tl.int64) * e_b + head.to(tl.int64) * e_h + m.to(tl.int64) * e_m
    may = tl.load(flags + block, mask=block < blocks, other=0)
    if tl.max(may, 0) == 0:
        tl.store(target, tl.full((KEYS,), -1.0, tl.float32))
    else:
        exists = (places < kv_len) & (may != 0)
        own_keys = keys + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
        k = tl.load(own_keys + places.to(tl.int64)[:, None] * k_n + dims, mask=exists[:, None], other=0.0)
        kind = tl.load(state + row.to(tl.int64) * kv_len + places, mask=exists, other=0)
        count = tl.load(row_count + row * segments + m).to(tl.int32)
        total = tl.zeros((KEYS,), tl.float32)
        for first in range(0, count, ROWS):
            stored = chunk_part * WIDTH + first + tl.arange(0, ROWS)
            q = tl.load(packed + stored[:, None] * DIM + dims)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            share = logits * tl.load(gains + stored)[None, :] - tl.load(guesses + stored)[None, :]
            total += tl.sum(tl.exp2(tl.minimum(share, 0.0)), 1)
        total = tl.where(kind == 2, count.to(tl.float32), total)
        tl.store(target, tl.where(kind == 0, -1.0, total))


def column_masses(
    query: Tensor, ready: ReadyKeys, guess: Tensor, eligible: Tensor, rows: Tensor, row_count: Tensor, part: slice,
    packed_at_once: int, segment: int, block: int, scale: float,
) -> Tensor:  # fmt: skip
    """Sums over the active rows of exp(logit - guess), cut at 1, for some segments.

    Args:
        query: (B, Hq, L, D), last dimension contiguous.
        ready: The keys, of ``ready_keys``.
        guess: float32 (B, Hq, L) contiguous.
        eligible: uint8 (B, Hkv, M, NK), strides may be 0 but the last is 1.
        rows: int (B, Hkv, M, R) contiguous.
        row_count: int64 (B, Hkv, M) contiguous.
        part: The segments.
        packed_at_once: Segments whose rows are gathered together.
        segment: Queries per segment.
        block: Keys per block of ``eligible``.
        scale: Logit scale.

    Returns:
        float32 (B, Hkv, segments of the part, S rounded up to ``KEYS``); -1 for what is no key to choose.
    """
    (batch, heads, q_len, _), (keys, key_gain, state, columns) = query.shape, ready
    kv_heads, kv_len, dim = keys.shape[1:]
    width, segments = rows.shape[3], rows.shape[2]
    tiles = triton.cdiv(kv_len, KEYS)
    mass = torch.empty(
        (batch, kv_heads, part.stop - part.start, tiles * KEYS), dtype=torch.float32, device=query.device
    )
    size = (batch, kv_heads, packed_at_once, width)
    packed = torch.empty((*size, dim), dtype=keys.dtype, device=query.device)
    gains, guesses = (torch.empty(size, dtype=torch.float32, device=query.device) for _ in range(2))
    for first in range(part.start, part.stop, packed_at_once):
        count = min(packed_at_once, part.stop - first)
        _pack[(width // ROWS, count, batch * kv_heads)](
            query, guess, rows, row_count, key_gain, state if columns is None else columns, packed, gains, guesses,
            *query.stride()[:3], q_len, scale * LOG2_E, first, segments, KV_HEADS=kv_heads, GROUP=heads // kv_heads,
            SEGMENT=segment, DIM=dim, TOP=FLOAT8_MAX if keys.dtype.itemsize == 1 else 1.0, ROWS=ROWS,
            NARROW=columns is not None,
        )  # fmt: skip
        _mass[(tiles, count, batch * kv_heads)](
            packed, gains, guesses, row_count, keys, state, eligible, mass, *keys.stride()[:3], *eligible.stride()[:3],
            eligible.shape[3], kv_len, first, segments, first - part.start, mass.shape[2], BLOCK=block,
            KV_HEADS=kv_heads, WIDTH=width, DIM=dim, ROWS=ROWS, KEYS=KEYS,
            PRECISION="ieee" if keys.dtype == torch.float32 else "tf32", num_warps=8, num_stages=3,
        )  # fmt: skip
    return mass

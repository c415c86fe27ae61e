"""The number of keys that a segment needs, and which, found by a search for a mass threshold instead of a sort.

A float32 that is not negative orders as its bits do, so the threshold is found bit by bit: each
walk over a segment's masses tries seven thresholds and fixes three bits. ``BITS`` of them
are fixed; keys whose mass agrees in all of these (within 1 / 512) are taken in
order of position. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Bits below the sign that the threshold is found to: eight of exponent, ten of mantissa.
BITS = 18
#: Masses that a program looks at together.
TILE = 4096


@triton.jit
def _threshold(masses, stop, goal, COUNTS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Bits of the largest threshold at or above which masses sum (keys count) to ``wanted`` or more; 0: none does."""
    low = 0
    tried = tl.arange(0, 8)
    for digit in tl.static_range(0, BITS // 3):
        thresholds = (low + (tried << (28 - 3 * digit))).to(tl.int32)
        edge = thresholds.to(tl.float32, bitcast=True)[None, :]
        sums = tl.zeros((TILE, 8), tl.float32)
        for start in range(0, stop, TILE):
            places = start + tl.arange(0, TILE)
            x = tl.load(masses + places, mask=places < stop, other=-1.0)[:, None]
            sums += tl.where((x >= edge) & (x >= 0.0), 1.0 if COUNTS else x, 0.0)
        enough = (tl.sum(sums, 0) >= goal) | (tried == 0)
        low = tl.max(tl.where(enough, thresholds, 0), 0)
    return low


@triton.jit
def _above(masses, stop, low, BITS: tl.constexpr, TILE: tl.constexpr):
    """The edges of the threshold's bucket, and number and mass of the keys above it."""
    edge = low.to(tl.float32, bitcast=True)
    end = (low + (1 << (31 - BITS))).to(tl.float32, bitcast=True)
    numbers, sums = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.float32)
    for start in range(0, stop, TILE):
        places = start + tl.arange(0, TILE)
        x = tl.load(masses + places, mask=places < stop, other=-1.0)
        numbers += (x >= end).to(tl.int32)
        sums += tl.where(x >= end, x, 0.0)
    return edge, end, tl.sum(numbers, 0), tl.sum(sums, 0)


@triton.jit(do_not_specialize=["s_b", "s_h", "size"])
def _needs(masses, stops, kept, target, needs, totals, s_b, s_h, size,
           KV_HEADS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Fewest keys of one segment that reach the target together with what is kept anyway."""
    m, row = tl.program_id(0), tl.program_id(1)
    part = row * tl.num_programs(0) + m
    masses += part.to(tl.int64) * size
    stop = tl.load(stops + (row // KV_HEADS) * s_b + (row % KV_HEADS) * s_h + m).to(tl.int32)
    sums, numbers = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.int32)
    for start in range(0, stop, TILE):
        places = start + tl.arange(0, TILE)
        x = tl.load(masses + places, mask=places < stop, other=-1.0)
        sums += tl.maximum(x, 0.0)
        numbers += (x >= 0.0).to(tl.int32)
    total, eligible = tl.sum(sums, 0), tl.sum(numbers, 0)
    kept_mass, target_share = tl.load(kept + part), tl.load(target)
    goal = target_share * (total + kept_mass) - kept_mass
    low = _threshold(masses, stop, goal, False, BITS, TILE)
    edge, _, number, mass = _above(masses, stop, low, BITS, TILE)
    more = tl.ceil(tl.maximum(goal - mass, 0.0) / tl.maximum(edge, 1e-30))
    need = tl.minimum(number.to(tl.float32) + more, eligible.to(tl.float32)).to(tl.int32)
    need = tl.where(goal <= 0.0, 0, need)
    need = tl.where(target_share >= 1.0, eligible, need)
    tl.store(needs + part, need.to(tl.int64))
    tl.store(totals + part, total)
    tl.store(needs + tl.num_programs(0) * tl.num_programs(1) + part, eligible.to(tl.int64))


@triton.jit(do_not_specialize=["s_b", "s_h", "size", "words", "first_segment", "segments"])
def _pick(masses, stops, budget, bits, chosen, s_b, s_h, size, words, first_segment, segments,
          KV_HEADS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The heaviest keys of one segment, as many as its budget, and their mass."""
    m, row = tl.program_id(0), tl.program_id(1)
    part = row * tl.num_programs(0) + m
    masses += part.to(tl.int64) * size
    bits += (row * segments + first_segment + m).to(tl.int64) * words
    stop = tl.load(stops + (row // KV_HEADS) * s_b + (row % KV_HEADS) * s_h + m).to(tl.int32)
    goal = tl.load(budget + part).to(tl.int32)
    low = _threshold(masses, stop, goal.to(tl.float32), True, BITS, TILE)
    edge, end, number, _ = _above(masses, stop, low, BITS, TILE)
    taken = tl.zeros((TILE,), tl.float32)
    above, level = 0, number
    in_word = tl.arange(0, 32)[None, :]
    for start in range(0, stop, TILE):
        places = start + tl.arange(0, TILE)
        x = tl.load(masses + places, mask=places < stop, other=-1.0)
        heavy = (x >= end).to(tl.int32)
        even = ((x >= edge) & (x < end)).to(tl.int32)
        slots = tl.where(heavy > 0, above + tl.cumsum(heavy, 0) - 1, level + tl.cumsum(even, 0) - 1)
        take = ((heavy > 0) | (even > 0)) & (slots < goal)
        packed = tl.sum(tl.reshape(take.to(tl.int32), (TILE // 32, 32)) << in_word, 1)
        at = start // 32 + tl.arange(0, TILE // 32)
        tl.store(bits + at, packed.to(tl.int32), mask=at < words)
        taken += tl.where(take, x, 0.0)
        above += tl.sum(heavy, 0)
        level += tl.sum(even, 0)
    tl.store(chosen + part, tl.sum(taken, 0))


def _fixed(mass: Tensor) -> dict[str, Any]:
    return {"KV_HEADS": int(mass.shape[1]), "BITS": BITS, "TILE": TILE, "num_warps": 16}


def masses_needed(mass: Tensor, stops: Tensor, kept: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``budget.need`` for masses that are not sorted.

    Args:
        mass: float32 (B, Hkv, M, S) contiguous; negative: no key to choose.
        stops: int32 (B, Hkv, M), the keys from here on are none; strides may be 0 but the last is 1.
        kept: float32 (B, Hkv, M) contiguous, mass of the always-kept keys.
        target: float32, one element; share of the whole mass to keep; from 1 on, all.

    Returns:
        int64 (B, Hkv, M) needs, int64 (B, Hkv, M) keys to choose from, float32 (B, Hkv, M) the masses' sums.
        A need may be larger than the fewest by the keys that agree in the leading ``BITS`` bits of their mass.
    """
    needs = torch.empty((2, *kept.shape), dtype=torch.int64, device=mass.device)
    totals = torch.empty_like(kept)
    _needs[(mass.shape[2], mass.shape[0] * mass.shape[1])](
        mass, stops, kept, target, needs, totals, *stops.stride()[:2], mass.shape[3], **_fixed(mass)
    )
    return needs[0], needs[1], totals


def pick(mass: Tensor, stops: Tensor, budget: Tensor, bits: Tensor, first_segment: int) -> Tensor:
    """Write each segment's ``budget`` heaviest keys.

    Args:
        mass: float32 (B, Hkv, m, S) contiguous; negative: no key to choose.
        stops: int32 (B, Hkv, m), see ``masses_needed``.
        budget: int64 (B, Hkv, m) contiguous, at most the number of keys to choose from.
        bits: int32 (B, Hkv, M, words) contiguous, see ``pack_bits``; zeros where m segments are written.
        first_segment: The first of them.

    Returns:
        float32 (B, Hkv, m), the masses' sums over the picked keys.
    """
    chosen = torch.empty(budget.shape, dtype=torch.float32, device=mass.device)
    _pick[(mass.shape[2], mass.shape[0] * mass.shape[1])](
        mass, stops, budget, bits, chosen, *stops.stride()[:2], mass.shape[3], bits.shape[3], first_segment,
        bits.shape[2], **_fixed(mass),
    )  # fmt: skip
    return chosen

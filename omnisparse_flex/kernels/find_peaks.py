"""The peak rule in one Triton kernel: candidates by block means, their exact rows, thresholds, and the chosen blocks.

A program takes one query block of the query heads that share keys, so that each key is loaded once for all of them. It
walks the block means twice (normaliser, candidates), then the candidates' keys, and keeps one number per row and
candidate in memory of its own. Importing this module needs Triton.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnisparse_flex.kernels.witness_rows import LOG2_E, Inputs, batch_stride, grown, witness_logs

#: Block means of a step, candidates of a step of the thresholds.
MEANS, SLOTS = 64, 64
#: Numbers that change with every prompt: none of them may start a compile.
VARYING = [
    "q_b", "q_h", "k_b", "k_h", "full_b", "some_b", "forced_b", "places_b", "count_b", "base_b", "q_blocks",
    "kv_blocks", "kv_len", "tiles", "further", "last", "scale",
]  # fmt: skip


class Tile(NamedTuple):
    """Sizes of a program: ``heads`` of a group, ``rows`` of all of them, ``keys`` of a step."""

    heads: int
    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def tile_of(group: int, dim: int, dtype: torch.dtype) -> Tile:
    """The sizes for ``group`` query heads over one KV head; fixed, because tuning would cost more than it gains."""
    most = 4 if dtype == torch.float32 or dim > 128 else 8
    heads = max(h for h in range(1, most + 1) if group % h == 0)
    rows = 16 * triton.next_power_of_2(heads)
    wide = dtype != torch.float32 and dim <= 128
    return Tile(heads, rows, 128 if wide else 64, 4, 2 if wide else 1)


@triton.jit
def _positions(places, count, block, first_block, head, index, phase, SIZE: tl.constexpr):
    """The query of each row, and whether there is one; ``peak_rows.row_of``."""
    live = tl.load(count + block).to(tl.int32)
    shift = (5 * (block + first_block) + 3 * head + phase) % 8
    at = (index * 8 + shift) * live // SIZE
    return tl.load(places + block * SIZE + at).to(tl.int32), live > 0


@triton.jit
def _append(entries, wanted, lists, number):
    """Append the wanted entries to a list that holds ``number``; the new number."""
    slots = number + tl.cumsum(wanted, 0) - 1
    tl.store(lists + slots, entries, mask=wanted > 0)
    return number + tl.sum(wanted, 0)


@triton.jit
def _stored(total):
    """A row's mass in a block, as a logarithm that half precision holds."""
    return tl.minimum(tl.log2(total), 30000.0).to(tl.float16)


@triton.jit(do_not_specialize=VARYING)
def _find_peaks(
    query, key, means, full, some, forced, places, count, base, floor, real, offset, witness, keep, recall, scored,
    lists, logs, q_b, q_h, k_b, k_h, full_b, some_b, forced_b, places_b, count_b, base_b, q_n, k_n, q_blocks, kv_blocks,
    kv_len, tiles, further, last, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, KB: tl.constexpr, KEYS: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr,
    CHUNK: tl.constexpr, SLOTS: tl.constexpr, ORDERED: tl.constexpr, PADDED: tl.constexpr, CANDIDATE: tl.constexpr,
    LOWEST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th query block, from the last one on, which sees most."""
    WIDE: tl.constexpr = M // 16
    TILES: tl.constexpr = KB // KEYS
    SLICES: tl.constexpr = GROUP // HEADS
    lists += tl.program_id(0).to(tl.int64) * kv_blocks
    logs += tl.program_id(0).to(tl.int64) * kv_blocks * M
    rows, dims, n = tl.arange(0, M), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    member, index = rows // 16, rows % 16
    q_b, q_h, k_b, k_h = q_b * ALIGN, q_h * ALIGN, k_b * ALIGN, k_h * ALIGN
    start = tl.load(offset).to(tl.int32)
    floor_share = tl.load(floor)
    parts, lanes = tiles // (q_blocks + further), tl.num_programs(0)
    for turn in range(0, tl.cdiv(tiles - tl.program_id(0), lanes)):
        # Every second turn in the other direction, so that no program gets the longest of every turn.
        back = tl.where(turn % 2 == 1, lanes - 1 - tl.program_id(0), tl.program_id(0))
        tile = turn * lanes + tl.where((turn + 1) * lanes <= tiles, back, tl.program_id(0))
        unit, part = q_blocks + further - 1 - tile // parts, tile % parts
        batch, head = part // (KV_HEADS * SLICES), part % (KV_HEADS * SLICES)
        kv_head, own_head = head // SLICES, (head // SLICES) * GROUP + (head % SLICES) * HEADS + member
        more = tl.where(unit >= q_blocks, 1 + (unit - q_blocks) // last, 0)
        block = tl.where(unit >= q_blocks, q_blocks - 1 - (unit - q_blocks) % last, unit)
        phase = ((more & 1) << 2) | (more & 2) | ((more >> 2) & 1)
        mine = member < HEADS
        place, live = _positions(
            places + batch.to(tl.int64) * places_b, count + batch.to(tl.int64) * count_b, block, start // SIZE,
            own_head, index, phase, SIZE,
        )  # fmt: skip
        q = tl.load(
            query + batch.to(tl.int64) * q_b + own_head.to(tl.int64)[:, None] * q_h
            + place.to(tl.int64)[:, None] * q_n + dims, mask=mine[:, None] & (dims < DIM), other=0.0,
        )  # fmt: skip
        seen_to = place + start
        limit = kv_blocks
        if ORDERED:
            limit = tl.minimum(kv_blocks, tl.maximum((block + 1) * SIZE + start + KB - 1, 0) // KB)
        least = tl.load(base + batch.to(tl.int64) * base_b + block)
        full_row = full + batch.to(tl.int64) * full_b + block.to(tl.int64) * kv_blocks
        some_row = some + batch.to(tl.int64) * some_b + block.to(tl.int64) * kv_blocks
        forced_row = forced + batch.to(tl.int64) * forced_b + block.to(tl.int64) * kv_blocks
        own_means = means + (batch * KV_HEADS + kv_head).to(tl.int64) * kv_blocks * DIM

        # 1. The softmax between block means, over the blocks that are seen wholly.
        top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        for c in range(0, limit, CHUNK):
            at = c + tl.arange(0, CHUNK)
            whole = tl.load(full_row + at, mask=at < limit, other=0) != 0
            m = tl.load(
                own_means + at[None, :] * DIM + dims[:, None],
                mask=(at[None, :] < limit) & (dims[:, None] < DIM),
                other=0.0,
            )
            z = tl.where(whole[None, :], tl.dot(q, m, input_precision=PRECISION) * scale, float("-inf"))
            top, total = grown(top, total, z)
        unseen = total == 0
        pooled = tl.where(unseen, 0.0, top + tl.log2(total))  # of means: a block's tokens come in later

        # 2. Candidates: what the means of one of a head's rows do not rule out.
        number, others = 0, tl.zeros((M,), tl.float32)
        bar = tl.where(least > 0, tl.log2(tl.maximum(least * CANDIDATE, 1e-30)), float("-inf"))
        for c in range(0, limit, CHUNK):
            at = c + tl.arange(0, CHUNK)
            inside = at < limit
            whole = tl.load(full_row + at, mask=inside, other=0) != 0
            must = tl.load(forced_row + at, mask=inside, other=0) != 0
            m = tl.load(
                own_means + at[None, :] * DIM + dims[:, None],
                mask=(at[None, :] < limit) & (dims[:, None] < DIM),
                other=0.0,
            )
            z = (
                tl.where(whole[None, :], tl.dot(q, m, input_precision=PRECISION) * scale, float("-inf"))
                - pooled[:, None]
            )
            hit = (whole[None, :] & mine[:, None] & (z >= bar)).to(tl.int32)
            by_head = tl.max(tl.reshape(hit, (WIDE, 16, CHUNK)), 1)
            bits = tl.sum(by_head << tl.arange(0, WIDE)[:, None], 0)
            bits = tl.where(must, 255, bits)
            taken = tl.reshape(tl.broadcast_to(tl.expand_dims(by_head, 1), (WIDE, 16, CHUNK)), (M, CHUNK)) > 0
            others += tl.sum(tl.where(whole[None, :] & ~must[None, :] & ~taken, tl.exp2(z), 0.0), 1)
            entry = at | (bits << 20) | (must.to(tl.int32) << 28)
            number = _append(entry, (whole & (bits > 0) & live).to(tl.int32), lists, number)
        ragged = number
        for c in range(0, limit, CHUNK):
            at = c + tl.arange(0, CHUNK)
            inside = at < limit
            whole = tl.load(full_row + at, mask=inside, other=0) != 0
            must = tl.load(forced_row + at, mask=inside, other=0) != 0
            touched = tl.load(some_row + at, mask=inside, other=0) != 0
            entry = at | (255 << 20) | (must.to(tl.int32) << 28)
            ragged = _append(entry, (touched & ~whole & live).to(tl.int32), lists, ragged)
        tl.debug_barrier()

        # 3. Exact rows over the candidates, then over the blocks that are seen in part.
        own_key = key + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        own_keys = own_key + n[None, :] * k_n + dims[:, None]
        # Mass is counted in units of what the means give all blocks, which no exact mass falls much short of.
        total, mass = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
        for group in range(0, number, 32):
            # A group's entries lie in registers: an address that hangs on a load would not be fetched ahead.
            entries = tl.load(lists + group + tl.arange(0, 32), mask=group + tl.arange(0, 32) < number, other=0)
            for i in range(group * TILES, tl.minimum(group + 32, number) * TILES):
                entry = tl.sum(tl.where(tl.arange(0, 32) == i // TILES - group, entries, 0), 0)
                at = (entry & 0xFFFFF) * KB + i % TILES * KEYS
                k = tl.load(own_keys + at.to(tl.int64) * k_n, mask=dims[:, None] < DIM, other=0.0)
                products = tl.dot(q, k, input_precision=PRECISION)
                own = tl.sum(tl.exp2(products * scale - pooled[:, None]), 1)
                own = tl.where(((entry >> (20 + member)) & 1) > 0, own, 0.0)
                total += own
                if TILES > 1:
                    own += tl.where(i % TILES > 0, mass, 0.0)
                    mass = own
                tl.store(logs + i // TILES * M + rows, _stored(own))
        for i in range(number * TILES, ragged * TILES):
            at = (tl.load(lists + i // TILES) & 0xFFFFF) * KB + i % TILES * KEYS
            there = at + n < kv_len
            k = tl.load(own_keys + at.to(tl.int64) * k_n, mask=there[None, :] & (dims[:, None] < DIM), other=0.0)
            if PADDED:
                there = there & (tl.load(real + batch.to(tl.int64) * kv_len + at + n, mask=there, other=0) != 0)
            z = tl.dot(q, k, input_precision=PRECISION) * scale
            if ORDERED:
                z = tl.where(at + n[None, :] <= seen_to[:, None], z, float("-inf"))
            z = tl.where(there[None, :], z, float("-inf"))
            # A row that sees no block wholly has no such unit.
            first = tl.max(z, 1)
            pooled = tl.where(unseen & (i == 0) & (first > float("-inf")), first, pooled)
            own = tl.sum(tl.exp2(z - pooled[:, None]), 1)
            total += own
            if TILES > 1:
                own += tl.where(i % TILES > 0, mass, 0.0)
                mass = own
            tl.store(logs + i // TILES * M + rows, _stored(own))
        tl.debug_barrier()

        # 4. The threshold of each row: lower where it would not leave the row its floor.
        total += others * KB
        normal = tl.where(total > 0, tl.minimum(tl.log2(total), 30000.0), 0.0)
        always, far = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
        power = tl.where(least > 0, tl.exp2(tl.ceil(tl.log2(tl.maximum(least, 1e-30)))), 0.0)
        for s in range(0, ragged, SLOTS):
            slots = s + tl.arange(0, SLOTS)
            valid = slots < ragged
            must = ((tl.load(lists + slots, mask=valid, other=0) >> 28) & 1) > 0
            y = tl.load(logs + slots[:, None] * M + rows[None, :], mask=valid[:, None], other=float("-inf")).to(
                tl.float32
            )
            share = tl.exp2(y - normal[None, :])
            always += tl.sum(tl.where(must[:, None], share, 0.0), 0)
            far += tl.sum(tl.where(~must[:, None] & (share >= power), share, 0.0), 0)
        threshold = tl.zeros((M,), tl.float32) + least
        short = tl.max(tl.where(mine & (always + far < floor_share), 1, 0), 0)
        if short > 0:
            STEPS: tl.constexpr = 16
            steps = tl.arange(0, STEPS)
            reached = tl.zeros((M, STEPS), tl.float32)
            for s in range(0, ragged, SLOTS):
                slots = s + tl.arange(0, SLOTS)
                valid = slots < ragged
                must = ((tl.load(lists + slots, mask=valid, other=0) >> 28) & 1) > 0
                y = tl.load(logs + slots[:, None] * M + rows[None, :], mask=valid[:, None], other=float("-inf")).to(
                    tl.float32
                )
                share = tl.where(must[:, None], 0.0, tl.exp2(y - normal[None, :]))
                tried = power * 0.5
                for step in tl.static_range(STEPS):
                    part_sum = tl.sum(tl.where(share >= tried, share, 0.0), 0)
                    reached += tl.where(steps[None, :] == step, part_sum[:, None], 0.0)
                    tried = tried * 0.5
            lower = power * tl.exp2(-1.0 - steps.to(tl.float32))
            enough = (always[:, None] + reached >= floor_share) & (lower[None, :] >= 2.0**LOWEST)
            found = tl.max(tl.where(enough, lower[None, :], 0.0), 1)
            threshold = tl.where(always + far >= floor_share, threshold, found)

        # 5. Blocks that one of a head's rows has a peak in, and what the witness row keeps with them.
        line = keep + ((batch * KV_HEADS * GROUP).to(tl.int64) * q_blocks + block) * kv_blocks
        heads = tl.arange(0, WIDE)
        real_head = kv_head * GROUP + (head % SLICES) * HEADS + heads
        exact = tl.load(
            witness + (batch * KV_HEADS * GROUP + own_head).to(tl.int64) * q_blocks + block, mask=mine, other=0.0
        )
        kept = tl.zeros((M,), tl.float32)
        for s in range(0, ragged, SLOTS):
            slots = s + tl.arange(0, SLOTS)
            valid = slots < ragged
            entry = tl.load(lists + slots, mask=valid, other=0)
            y = tl.load(logs + slots[:, None] * M + rows[None, :], mask=valid[:, None], other=float("-inf")).to(
                tl.float32
            )
            hit = (tl.exp2(y - normal[None, :]) >= threshold[None, :]).to(tl.int32)
            by_head = tl.max(tl.reshape(hit, (SLOTS, WIDE, 16)), 2)
            by_head = by_head & (entry[:, None] >> (20 + heads[None, :])) & 1
            ours = valid[:, None] & (heads[None, :] < HEADS)
            to = line + real_head.to(tl.int64)[None, :] * q_blocks * kv_blocks + (entry & 0xFFFFF)[:, None]
            tl.store(to, (by_head > 0).to(tl.uint8), mask=ours & (by_head > 0) & (((entry >> 28) & 1) == 0)[:, None])
            stays = by_head | ((entry >> 28) & 1)[:, None]
            stays = tl.reshape(tl.broadcast_to(tl.expand_dims(stays, 2), (SLOTS, WIDE, 16)), (SLOTS, M)) > 0
            kept += tl.sum(tl.where(stays, tl.exp2(y + pooled[None, :] - exact[None, :]), 0.0), 0)
        kept = tl.where(live & (exact > float("-inf")), kept, 1.0)
        told = recall + (batch * KV_HEADS * GROUP + own_head).to(tl.int64) * q_blocks + block
        tl.store(told, tl.minimum(kept, 1.0), mask=mine & (index == 15) & (unit < q_blocks))
        line = scored + (batch * KV_HEADS * GROUP + own_head).to(tl.int64) * q_blocks + block
        tl.store(line, tl.zeros((M,), tl.float32) + ragged, mask=mine & (index == 15) & (unit < q_blocks))
        tl.debug_barrier()


@functools.cache
def _lanes(device: int) -> int:
    """Programs at a time: two on every multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def find_peaks(
    query: Tensor, key: Tensor, means: Tensor, full: Tensor, some: Tensor, forced: Tensor, places: Tensor,
    count: Tensor, base: Tensor, floor: Tensor, real: Tensor | None, offset: Tensor | None, scale: float,
    key_block: int, phases: int, numbers: tuple[float, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The peak rule (``masks.blocks.peak``) for a plain mask and logits that are products alone.

    Args:
        query: (B, Hq, L, D), like the next ones as in ``Inputs``, but of any strides.
        key: (B, Hkv, S, D).
        means: (B, Hkv, NK, D).
        full: bool (B or 1, 1, NQ, NK).
        some: Likewise.
        forced: Likewise.
        places: int32 (B or 1, 1, NQ, 128).
        count: int32 (B or 1, 1, NQ).
        base: float32 (B or 1, 1, NQ).
        floor: float32, 0-d.
        real: bool (B, S), or None.
        offset: int64, one element, or None.
        scale: Logit scale, above 0.
        key_block: Tokens of a key block, 64 or 128.
        phases: Further sets of rows of the last two blocks.
        numbers: ``CANDIDATE`` and ``LOWEST`` of the rule.

    Returns:
        ``Peaks``: the chosen blocks, bool (B, Hq, NQ, NK), recall and cost, float32 (B, Hq, NQ) each. Besides them,
        the kernels hold a number of 2 bytes per row of a program and key block: 69 MB at 128K tokens on an H100.
    """
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    rest = [x.contiguous() for x in (means, full, some, forced, places, count, base, floor)]
    given = Inputs._make([query, key, *rest, None if real is None else real.contiguous(), offset])
    return _launch(query, given, scale, key_block, phases, numbers)


def _launch(
    query: Tensor, given: Inputs, scale: float, key_block: int, phases: int, numbers: tuple[float, int]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dim = query.shape
    kv_heads, kv_len = given.key.shape[1:3]
    q_blocks, kv_blocks = given.full.shape[2:]
    tile = tile_of(heads // kv_heads, dim, query.dtype)
    parts = batch * kv_heads * (heads // kv_heads // tile.heads)
    last = min(2, q_blocks)
    tiles = parts * (q_blocks + last * phases)
    lanes = min(_lanes(query.device.index) if query.is_cuda else 3, tiles)
    device = query.device
    keep = torch.zeros((batch, heads, q_blocks, kv_blocks), dtype=torch.uint8, device=device)
    recall = torch.ones((batch, heads, q_blocks), dtype=torch.float32, device=device)
    scored = torch.zeros_like(recall)
    lists = torch.empty((lanes, kv_blocks), dtype=torch.int32, device=device)
    logs = torch.empty((lanes, kv_blocks, tile.rows), dtype=torch.float16, device=device)
    shapes = {
        "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEADS": tile.heads, "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)), "SIZE": given.places.shape[3],
        "ORDERED": given.offset is not None, "PADDED": given.real is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    offset = torch.zeros((1,), dtype=torch.int64, device=device) if given.offset is None else given.offset
    real = given.full if given.real is None else given.real
    strides = (*query.stride()[:2], *given.key.stride()[:2])
    shapes["ALIGN"] = align = math.gcd(16, *strides)
    strides = tuple(x // align for x in strides)
    witness = witness_logs(given, offset, real, strides, scale, shapes)
    _find_peaks[(lanes,)](
        query, given.key, given.means, *(x.view(torch.uint8) for x in (given.full, given.some, given.forced)),
        given.places, given.count, given.base, given.floor, real.view(torch.uint8), offset, witness, keep, recall,
        scored, lists, logs, *strides, *(batch_stride(x) for x in given[3:9]), query.stride(2), given.key.stride(2),
        q_blocks, kv_blocks, kv_len, tiles, last * phases, last, scale * LOG2_E,
        KB=key_block, KEYS=min(tile.keys, key_block), M=tile.rows, CHUNK=MEANS, SLOTS=SLOTS, CANDIDATE=numbers[0],
        LOWEST=numbers[1], maxnreg=tile.registers, **shapes,
    )  # fmt: skip
    return keep.view(torch.bool), recall, scored

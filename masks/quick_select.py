"""``select_tokens`` with Triton kernels: no logits, no sort, no more than a few segments' masses at a time.

Importing this module needs Triton.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks import block_lists
from omnisparse_flex.masks.budget import shared_budget
from omnisparse_flex.masks.estimate_kernel import KEYS, classify, column_masses
from omnisparse_flex.masks.key_bits import words
from omnisparse_flex.masks.key_lists_kernel import list_keys
from omnisparse_flex.masks.keys_kernel import ReadyKeys, packed_type, ready_keys
from omnisparse_flex.masks.leaders import GUESS_POOL, LOOKED_AT, leader_rows
from omnisparse_flex.masks.pick_kernel import masses_needed, pick
from omnisparse_flex.masks.queries import LAZY_STRIDE, REDUNDANCY_THRESHOLD
from omnisparse_flex.masks.rectangle_kernel import Lists, attend_lists
from omnisparse_flex.masks.room import at_once
from omnisparse_flex.masks.segments import SegmentLayout, pack_rows, segments_of
from omnisparse_flex.masks.tokens import TokenSelection, largest_budget

#: The masses that are held at once, and the gathered rows, take the keys' and values' bytes divided by these.
MASSES, ROWS = 4, 8


@torch.no_grad()
def select_quickly(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    segments: SegmentLayout,
    text: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    target: Tensor | float,
    scale: float,
    real: Tensor | None,
    columns: Tensor | None = None,
) -> TokenSelection:
    """Choose the active queries and the keys of every segment, under a ``PlainMask`` and with ``scoring="one_pass"``.

    Args:
        query: (B, Hq, L, D), last dimension contiguous.
        key: (B, Hkv, S, D), last dimension contiguous.
        near_lse: float32 (B, Hq, L) contiguous.
        segments: Blocks that are always kept, and blocks to choose from.
        text: bool (B or 1, L), queries that are always active.
        config: Rules.
        block: Tokens per block of ``segments``.
        target: Recall to keep, number or 0-d tensor.
        scale: Logit scale.
        real: uint8 (B, S) contiguous, 0 = a key nobody sees; None: there is none.
        columns: int32 (B, Hkv, dims) contiguous, the coordinates that scores multiply; None: all.

    Returns:
        As ``select_tokens``, with int32 rows.

    Source: PAPER "Query selection", "KV selection" at token granularity.
    """
    dims = query.shape[3] if columns is None else columns.shape[2]
    means, ready = ready_keys(key, real, GUESS_POOL, packed_type(query, dims), columns)
    scores = _Scores(query, key, ready, near_lse, segments.eligible, config.segment_size, block, scale)
    far = _looked_at(scores, means, config)
    del means
    if config.lazy_threshold is None:
        lazy = torch.zeros(query.shape[:3], dtype=torch.bool, device=query.device)
        active = ~lazy
    else:
        active, lazy = classify(query, near_lse, far, text, config.lazy_threshold, REDUNDANCY_THRESHOLD, LAZY_STRIDE)
    order, row_count = pack_rows(active, key.shape[1], config.segment_size)
    rows = order.int()
    del order  # twice as large
    chosen = _choose(scores, far, active, rows, row_count, config, target)
    return TokenSelection(segments, active, lazy, rows, row_count, *chosen)


class _Scores(NamedTuple):
    """What the scores of a call are made of.

    Attributes:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        ready: The keys as they are multiplied.
        near_lse: float32 (B, Hq, L) contiguous.
        eligible: bool (B or 1, Hkv or 1, M, NK).
        segment: Queries per segment.
        block: Keys per block of ``eligible``.
        scale: Logit scale.
    """

    query: Tensor
    key: Tensor
    ready: ReadyKeys
    near_lse: Tensor
    eligible: Tensor
    segment: int
    block: int
    scale: float


def _looked_at(scores: _Scores, means: Tensor, config: OmniSparseConfig) -> Tensor:
    """``leaders.looked_at_lse``, (B, Hq, L) contiguous; ``means`` are those of ``GUESS_POOL`` keys."""
    query, (batch, kv_heads, _, _), segment = scores.query, scores.key.shape, scores.segment
    size = (batch, kv_heads, scores.eligible.shape[2])
    order, row_count = leader_rows(size, query.shape[1] // kv_heads * segment, query.device)
    rows, row_count = order.int().contiguous(), row_count.contiguous()
    count, pools = (x.expand(*size[:2], *x.shape[2:]) for x in block_lists(scores.eligible))
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    lists = Lists(rows, row_count, pools, count, scores.block // GUESS_POOL, segment)
    attend_lists(query, means, None, None, lse, lists, scores.scale)
    far = lse.add_(math.log(GUESS_POOL))
    leads = (torch.arange(query.shape[2], device=query.device) % LAZY_STRIDE == 0).expand(far.shape)
    fixed = dataclasses.replace(config, budget=LOOKED_AT, max_kv_budget=None)
    chosen, number, *_ = _choose(scores, far, leads, rows, row_count, fixed, 1.0)
    del rows
    keys = torch.empty((*size, LOOKED_AT), dtype=torch.int32, device=query.device)
    list_keys(chosen, slice(0, size[2]), keys)
    attend_lists(query, scores.key, None, None, lse, Lists(None, None, keys, number, 1, segment), scores.scale)
    return lse


def _steps(key: Tensor, rows: Tensor, size: int) -> tuple[int, int]:
    """Segments whose masses are held at once, and whose rows, of ``size`` bytes, are gathered at once."""
    batch, kv_heads, kv_len, _ = key.shape
    heads, count = batch * kv_heads, rows.shape[2]
    step = at_once(count, heads * -(-kv_len // KEYS) * KEYS * 4, key, MASSES)
    return step, at_once(step, heads * rows.shape[3] * (size + 8), key, ROWS)


def _choose(
    scores: _Scores, far: Tensor, asking: Tensor, rows: Tensor, row_count: Tensor, config: OmniSparseConfig,
    target: Tensor | float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of a ``TokenSelection`` from ``chosen`` on, a few segments at a time.

    Args:
        scores: Of whom.
        far: float32 (B, Hq, L) contiguous, a lower bound of the eligible keys' log-sum-exp; written over.
        asking: bool (B, Hq, L), the listed queries.
        rows: int32 (B, Hkv, M, R) contiguous, their rows first.
        row_count: int64 (B, Hkv, M) contiguous.
        config: Rules.
        target: Recall to keep, number or 0-d tensor.
    """
    query, key, ready, near_lse, eligible, segment, block, scale = scores
    kv_len, device = key.shape[2], query.device
    guess = torch.logaddexp(near_lse, far, out=far)
    near = torch.where(asking & guess.isfinite(), torch.exp(near_lse - guess), 0.0).unsqueeze(-1)
    kept = segments_of(near, key.shape[1], segment).sum((3, 4))
    del near
    if isinstance(target, (int, float)):
        target = torch.full((1,), target, device=device)
    goal = target.to(device, torch.float32).reshape(1)
    size = (*row_count.shape[:2], -1)
    flags = eligible.to(torch.uint8)
    ends = (torch.arange(flags.shape[-1], device=device, dtype=torch.int32) + 1) * block
    stops = (ends * flags).amax(-1).clamp(max=kv_len).expand(size)
    flags = flags.expand(*size, -1)
    most = largest_budget(config, kv_len)
    bits = torch.zeros((*row_count.shape, words(kv_len)), dtype=torch.int32, device=device)
    step, packed = _steps(key, rows, ready.keys.shape[3] * ready.keys.element_size())
    found = []
    for start in range(0, row_count.shape[2], step):
        part = slice(start, min(start + step, row_count.shape[2]))
        asked, anyway, ends = row_count[:, :, part] > 0, kept[:, :, part].contiguous(), stops[:, :, part].contiguous()
        mass = column_masses(query, ready, guess, flags, rows, row_count, part, packed, segment, block, scale)
        needs, there, total = masses_needed(mass, ends, anyway, goal)
        budget = shared_budget(needs.clamp(max=most), asked, config.budget)
        # A head may be asked for more keys than it can see.
        count = torch.minimum(budget, there).contiguous()
        share = (anyway + pick(mass, ends, count, bits, start)) / (anyway + total).clamp(min=1e-30)
        found.append((count, needs, share, (needs > most) & asked))
        del mass  # before the next ones are made
    return (bits, *(torch.cat(parts, 2) for parts in zip(*found, strict=True)))


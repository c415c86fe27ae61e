"""``select_tokens`` with Triton kernels: no logits, no sort, no more than a few segments' masses at a time.

Importing this module needs Triton.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks import block_lists
from omnisparse_flex.masks.budget import shared_budget
from omnisparse_flex.masks.estimate_kernel import classify, column_masses, packed_keys, packed_type
from omnisparse_flex.masks.mean_pool import block_mean
from omnisparse_flex.masks.one_pass import GUESS_POOL
from omnisparse_flex.masks.pick_kernel import masses_needed, pick
from omnisparse_flex.masks.queries import LAZY_STRIDE, REDUNDANCY_THRESHOLD
from omnisparse_flex.masks.rectangle_kernel import Lists, attend_lists
from omnisparse_flex.masks.segments import SegmentLayout, pack_rows, segments_of
from omnisparse_flex.masks.tokens import TokenSelection, columns

#: Masses held at once, over all heads: 128 MiB in float32.
CHUNK_MASSES = 1 << 25


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

    Returns:
        As ``select_tokens``, with int32 keys by position instead of mass; what lies behind ``key_count`` is arbitrary.

    Source: PAPER "Query selection", "KV selection" at token granularity.
    """
    finite = key.isfinite().all(-1)
    whole = torch.where(finite.unsqueeze(-1), key, 0.0)
    eligible = segments.eligible
    every = torch.ones(query.shape[:3], dtype=torch.bool, device=query.device)
    if config.lazy_threshold is None:
        active, lazy = every, ~every
    else:
        # Keys as they are: where one is NaN nobody is lazy, so that it shows.
        far = _pooled(query, key, eligible, None, config.segment_size, block=block, pool=block, scale=scale)
        active, lazy = classify(query, near_lse, far, text, config.lazy_threshold, REDUNDANCY_THRESHOLD, LAZY_STRIDE)
    rows = pack_rows(active, int(key.shape[1]), config.segment_size)
    far = _pooled(query, whole, eligible, rows, config.segment_size, block=block, pool=GUESS_POOL, scale=scale)
    guess = torch.logaddexp(near_lse, far)
    says = active & guess.isfinite()
    near = torch.where(says, torch.exp(near_lse - guess), 0.0).unsqueeze(-1)
    kept = segments_of(near, int(key.shape[1]), config.segment_size).sum((3, 4))
    keys = packed_keys(whole, finite, real, packed_type(query))
    chosen = _choose(query, keys, guess, eligible, rows, kept, config, block=block, target=target, scale=scale)
    return TokenSelection(segments, active, lazy, *rows, *chosen)


def _choose(
    query: Tensor,
    packed: tuple[Tensor, Tensor, Tensor],
    guess: Tensor,
    eligible: Tensor,
    rows: tuple[Tensor, Tensor],
    kept: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    target: Tensor | float,
    scale: float,
) -> tuple[Tensor, ...]:
    """Keys, their number, needs, estimated mass and overflow of every segment, a few segments at a time."""
    kv_len, row_count, device = packed[0].shape[2], rows[1], query.device
    if isinstance(target, (int, float)):
        target = torch.full((1,), target, device=device)
    goal = target.to(device, torch.float32).reshape(1)
    size = (packed[0].shape[0], packed[0].shape[1], -1)
    flags = eligible.to(torch.uint8)
    ends = (torch.arange(flags.shape[-1], device=device, dtype=torch.int32) + 1) * block
    stops = (ends * flags).amax(-1).clamp(max=kv_len).expand(size)
    flags = flags.expand(*size, -1)
    most = kv_len if config.max_kv_budget is None else min(config.max_kv_budget, kv_len)
    keys = torch.empty((*row_count.shape, columns(config, most)), dtype=torch.int32, device=device)
    step = max(1, CHUNK_MASSES // (row_count.shape[0] * row_count.shape[1] * flags.shape[-1] * block))
    found = []
    for start in range(0, row_count.shape[2], step):
        part = slice(start, min(start + step, row_count.shape[2]))
        asked, anyway, ends = row_count[:, :, part] > 0, kept[:, :, part].contiguous(), stops[:, :, part].contiguous()
        mass = column_masses(query, *packed, guess, flags, *rows, part, config.segment_size, block, scale)
        needs, there, total = masses_needed(mass, ends, anyway, goal)
        budget = shared_budget(needs.clamp(max=most), asked, config.budget)
        # A head may be asked for more keys than it can see.
        count = torch.minimum(budget, there).contiguous()
        share = (anyway + pick(mass, ends, count, keys, start)) / (anyway + total).clamp(min=1e-30)
        found.append((count, needs, share, (needs > most) & asked))
    return (keys, *(torch.cat(parts, 2) for parts in zip(*found, strict=True)))


def _pooled(
    query: Tensor,
    key: Tensor,
    eligible: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    segment: int,
    *,
    block: int,
    pool: int,
    scale: float,
) -> Tensor:
    """``pooled_lse`` of the listed rows (None: all), -inf elsewhere."""
    count, listed = block_lists(eligible)
    own, own_count = (None, None) if rows is None else rows
    size = (key.shape[0], key.shape[1], -1)
    lists = Lists(own, own_count, listed.expand(*size, -1), count.expand(size), block // pool, segment)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    attend_lists(query, block_mean(key, pool), None, None, lse, lists, scale)
    return lse.add_(math.log(pool))

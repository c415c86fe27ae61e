"""``select_tokens`` with Triton kernels: no logits, no sort, no more than a few segments' masses at a time.

Importing this module needs Triton.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.kernels.attend_lists import KeyLists, attend_lists
from omnisparse_flex.kernels.classify_queries import classify
from omnisparse_flex.kernels.column_mass import KEYS, column_masses
from omnisparse_flex.kernels.pack_keys import ReadyKeys, packed_type, ready_keys
from omnisparse_flex.kernels.top_keys import masses_needed, pick
from omnisparse_flex.masks.blocks.block_lists import block_lists
from omnisparse_flex.masks.blocks.budget import shared_budget
from omnisparse_flex.masks.blocks.lazy import LAZY_STRIDE, REDUNDANCY_THRESHOLD
from omnisparse_flex.masks.blocks.mean_pool import block_mean
from omnisparse_flex.masks.tokens.chunks import segments_per_chunk
from omnisparse_flex.masks.tokens.key_bits import words
from omnisparse_flex.masks.tokens.one_pass import GUESS_POOL
from omnisparse_flex.masks.tokens.segments import SegmentLayout, pack_rows, segments_of
from omnisparse_flex.masks.tokens.select import TokenSelection, largest_budget

#: The masses that are held at once, and the gathered rows, take the keys' and values' bytes divided by these.
MASSES, ROWS = 4, 8


@torch.no_grad()
def select_tokens_triton(
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
    """Choose the active queries and the keys of every segment, under a ``CausalPaddingMask``.

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
    eligible, kv_heads, segment = segments.eligible, int(key.shape[1]), config.segment_size
    if config.lazy_below is None:
        lazy = torch.zeros(query.shape[:3], dtype=torch.bool, device=query.device)
        active = ~lazy
    else:
        # Keys as they are: where one is NaN nobody is lazy, so that it shows.
        far = _pooled(query, block_mean(key, block), block, eligible, None, segment, block=block, scale=scale)
        active, lazy = classify(query, near_lse, far, text, config.lazy_below, REDUNDANCY_THRESHOLD, LAZY_STRIDE)
        del far
    order, row_count = pack_rows(active, kv_heads, segment)
    rows = order.int()
    del order  # twice as large
    dims = query.shape[3] if columns is None else columns.shape[2]
    means, ready = ready_keys(key, real, GUESS_POOL, packed_type(query, dims), columns)
    far = _pooled(query, means, GUESS_POOL, eligible, (rows, row_count), segment, block=block, scale=scale)
    guess = torch.logaddexp(near_lse, far, out=far)
    near = torch.where(active & guess.isfinite(), torch.exp(near_lse - guess), 0.0).unsqueeze(-1)
    kept = segments_of(near, kv_heads, segment).sum((3, 4))
    del means, near
    steps = _steps(key, rows, dims * ready.keys.element_size())
    listed = (eligible, rows, row_count, kept, config, steps)
    chosen = _choose(query, ready, guess, *listed, block=block, target=target, scale=scale)
    return TokenSelection(segments, active, lazy, rows, row_count, *chosen)


def _steps(key: Tensor, rows: Tensor, size: int) -> tuple[int, int]:
    """Segments whose masses are held at once, and whose rows, of ``size`` bytes, are gathered at once."""
    batch, kv_heads, kv_len, _ = key.shape
    heads, count = batch * kv_heads, rows.shape[2]
    step = segments_per_chunk(count, heads * -(-kv_len // KEYS) * KEYS * 4, key, MASSES)
    return step, segments_per_chunk(step, heads * rows.shape[3] * (size + 8), key, ROWS)


def _choose(
    query: Tensor,
    ready: ReadyKeys,
    guess: Tensor,
    eligible: Tensor,
    rows: Tensor,
    row_count: Tensor,
    kept: Tensor,
    config: OmniSparseConfig,
    steps: tuple[int, int],
    *,
    block: int,
    target: Tensor | float,
    scale: float,
) -> tuple[Tensor, ...]:
    """Bits of the keys, their number, needs, estimated mass and overflow of every segment, a few at a time."""
    kv_len, device = ready.keys.shape[2], query.device
    if isinstance(target, (int, float)):
        target = torch.full((1,), target, device=device)
    goal = target.to(device, torch.float32).reshape(1)
    size = (*row_count.shape[:2], -1)
    flags = eligible.to(torch.uint8)
    ends = (torch.arange(flags.shape[-1], device=device, dtype=torch.int32) + 1) * block
    stops = (ends * flags).amax(-1).clamp(max=kv_len).expand(size)
    flags = flags.expand(*size, -1)
    max_budget = largest_budget(config, kv_len)
    bits = torch.zeros((*row_count.shape, words(kv_len)), dtype=torch.int32, device=device)
    step, packed = steps
    parts = []
    for start in range(0, row_count.shape[2], step):
        part = slice(start, min(start + step, row_count.shape[2]))
        is_active = row_count[:, :, part] > 0
        kept_mass, key_stops = (x[:, :, part].contiguous() for x in (kept, stops))
        mass = column_masses(
            query, ready, guess, flags, rows, row_count, part, packed, config.segment_size, block, scale
        )
        needs, key_count, total = masses_needed(mass, key_stops, kept_mass, goal)
        budget = shared_budget(needs.clamp(max=max_budget), is_active, config.budget)
        # A head may be asked for more keys than it can see.
        count = torch.minimum(budget, key_count).contiguous()
        share = (kept_mass + pick(mass, key_stops, count, bits, start)) / (kept_mass + total).clamp(min=1e-30)
        parts.append((count, needs, share, (needs > max_budget) & is_active))
        del mass  # before the next ones are made
    return (bits, *(torch.cat(fields, 2) for fields in zip(*parts, strict=True)))


def _pooled(
    query: Tensor,
    means: Tensor,
    pool: int,
    eligible: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    segment: int,
    *,
    block: int,
    scale: float,
) -> Tensor:
    """``pooled_lse`` over the means of ``pool`` keys, for the listed rows (None: all); -inf elsewhere."""
    count, listed = block_lists(eligible)
    row_list, row_count = (None, None) if rows is None else rows
    size = (means.shape[0], means.shape[1], -1)
    lists = KeyLists(row_list, row_count, listed.expand(*size, -1), count.expand(size), block // pool, segment)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    attend_lists(query, means, None, None, lse, lists, scale)
    return lse.add_(math.log(pool))

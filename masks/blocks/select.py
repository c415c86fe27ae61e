"""Block selection: the map of key blocks that each query block keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.budget import keep_top, need, rank, shared_budget
from omnisparse_flex.masks.blocks.last_rows import with_last_rows
from omnisparse_flex.masks.blocks.layout import Layout, block_layout, own_positions
from omnisparse_flex.masks.blocks.lazy import active_rows
from omnisparse_flex.masks.blocks.mean_pool import block_mean, mean_pool
from omnisparse_flex.masks.blocks.peak import Peaks
from omnisparse_flex.masks.blocks.peak_op import peaks_of
from omnisparse_flex.masks.blocks.peak_rows import ROWS
from omnisparse_flex.masks.blocks.scorer import Scorer
from omnisparse_flex.masks.blocks.tile_pool import TILE, tile_pool
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.live_keys import live_keys
from omnisparse_flex.masks.expr.opaque import OpaqueMask

#: Side of a block, in tokens: of queries, and of keys unless ``config.key_block`` is less. FlexAttention's backward
#: takes no other size on sm90.
BLOCK = 128

#: Logits under it stand for pairs that are not allowed, whoever says so.
FORBIDDEN = -1e6

SCORERS: dict[str, Scorer] = {"mean_pool": mean_pool, "tile_pool": tile_pool}
#: A scorer's products for a pair of blocks, as a share of what attention itself computes for it (QK and PV).
COSTS = {"mean_pool": 0.5 / BLOCK**2, "tile_pool": 0.5 / TILE**2, "sampled_rows": 0.5 * ROWS / BLOCK}


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSelection:
    """What one attention site keeps; the head axis is that of the query heads.

    Attributes:
        keep: bool (B, Hq, NQ, NK), the blocks to compute.
        layout: What does not depend on queries and keys.
        recall: float32 (B, Hq, NQ), what of its mass a row block keeps: by the estimate, or of an exact row.
        scored: float32 (B, Hq, NQ), key blocks whose keys were multiplied, where the rule chooses which.
        mass: float32 (B, Hq, NQ, NK), the estimate; NK = 0 for the peak rule, which makes none.
        needs: int64 (B, Hq, NQ), blocks each head would need.
        budget: int64 (B, Hq, NQ), blocks each head got, at most ``max_kv_budget``.
        active: bool (B, Hq, NQ).
        lazy: bool (B, Hq, NQ).
        overflow: bool (B, Hq, NQ), rows whose need exceeded ``max_kv_budget``.
    """

    keep: Tensor
    layout: Layout
    recall: Tensor
    scored: Tensor
    mass: Tensor
    needs: Tensor
    budget: Tensor
    active: Tensor
    lazy: Tensor
    overflow: Tensor


@torch.no_grad()
def select_blocks(
    query: Tensor,
    key: Tensor,
    mask: IndexMask | OpaqueMask,
    config: OmniSparseConfig,
    *,
    target: Tensor | float,
    scale: float,
    visual: Tensor | None = None,
    q_offset: Tensor | int = 0,
    adjust: Callable[..., Tensor] | None = None,
    min_peak: Tensor | float | None = None,
    score: Callable[..., Tensor] | None = None,
    layout: Layout | None = None,
) -> BlockSelection:
    """Choose the key blocks of every query block, each query head for itself.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        config: Rules; its ``target_recall`` is ignored in favour of ``target``.
        target: Recall to keep, number or 0-d tensor.
        scale: Logit scale.
        visual: bool (B, S), visual tokens; of the others long runs are always kept, see ``text_blocks``.
            None: every token is eligible.
        q_offset: Position of query 0 among the keys, int or 0-d int tensor.
        adjust: The model's own change of the logits, see ``change_of_logits``, for the rules that count.
        min_peak: Share of a row that is a peak, number or 0-d tensor, for the peak rule; None: the config's first.
        score: The model's own change of a logit, ``(logits, b, h, q, kv) -> logits``, or None, for the peak rule.
        layout: What ``block_layout`` gives for these inputs, where layers share it; None: made here.

    Returns:
        The selection; a pure function of its inputs, without gradients.

    Source: PAPER "KV selection" and "Query selection" at block granularity.
    """
    grid = grid_of(query, key, config.split)
    if layout is None:
        layout = block_layout(mask, grid, config, visual=visual, q_offset=q_offset)

    if config.budget == "peak":
        min_peak = config.min_peak_of(0) if min_peak is None else min_peak
        peaks = peaks_of(
            query, key, mask, layout, grid, own=own_positions(grid, q_offset), q_offset=q_offset, min_peak=min_peak,
            floor=target, scale=scale, last_rows=config.last_rows, score=score,
        )  # fmt: skip
        return _by_peaks(peaks, layout)
    sides: dict[str, Any] = {"scale": scale, "block": BLOCK, "key_block": grid.kv_block, "adjust": adjust}
    live = live_keys(mask, query.shape[0], key.shape[2], query.device)
    mass = SCORERS[config.scorer](query, key, layout.some, allowed=mask.pairs, live=live, **sides)
    if config.last_rows > 0:
        mass = with_last_rows(mass, query, key, layout.some, config.last_rows, mask=mask, **sides)
    local_mass = (mass * layout.near).sum(-1)
    active, lazy = active_rows(block_mean(query, BLOCK), local_mass, layout.text_rows, config.lazy_below)

    sorted_mass, order = rank(mass, layout.eligible)
    needs = need(sorted_mass, (mass * layout.forced).sum(-1), layout.eligible.sum(-1), target)
    needs, overflow = _capped(needs, config.max_kv_budget, grid.kv_block)
    budget = shared_budget(needs, active, _blocks_of(config.budget, grid.kv_block))
    keep = layout.forced | keep_top(order, layout.eligible, budget)
    recall = (mass * keep).sum(-1)
    scored = torch.zeros_like(recall)
    return BlockSelection(keep, layout, recall, scored, mass, needs, budget, active, lazy, overflow & active)


def _by_peaks(peaks: Peaks, layout: Layout) -> BlockSelection:
    """What the peak rule chose: a query block that fetches nothing is lazy."""
    chosen = peaks.chosen & layout.eligible
    number = chosen.sum(-1)
    active = number > 0
    blank = torch.zeros((*chosen.shape[:3], 0), dtype=torch.float32, device=chosen.device)
    none = torch.zeros_like(active)
    keep = chosen | layout.forced
    return BlockSelection(keep, layout, peaks.recall, peaks.scored, blank, number, number, active, ~active, none)


def dense_selection(query: Tensor, key: Tensor, mask: IndexMask | OpaqueMask) -> tuple[Tensor, Tensor]:
    """``(keep, full)`` maps that keep everything the mask allows; (1 or B, 1 or Hq, NQ, NK)."""
    full, some = mask.bounds(grid_of(query, key))
    some, full = torch.broadcast_tensors(some, full)
    return some, full


def grid_of(query: Tensor, key: Tensor, split: int = 1) -> Grid:
    """The blocks of (B, Hq, L, D) queries over (B, Hkv, S, D) keys, ``split`` key blocks to ``BLOCK`` tokens."""
    return Grid(query.shape[0], query.shape[1], query.shape[2], key.shape[2], BLOCK, query.device, split)


def scoring_cost(config: OmniSparseConfig) -> float:
    """``COSTS`` of the config's scorer: a mean of fewer keys stands for fewer pairs."""
    return COSTS[config.scorer] * (config.split if config.scorer == "mean_pool" else 1)


def _blocks_of(budget: str | int, block: int) -> str | int:
    """A token budget in key blocks, rounded up; rule names pass through."""
    return budget if isinstance(budget, str) else (budget + block - 1) // block


def _capped(needs: Tensor, max_kv_budget: int | None, block: int) -> tuple[Tensor, Tensor]:
    if max_kv_budget is None:
        return needs, torch.zeros_like(needs, dtype=torch.bool)
    limit = (max_kv_budget + block - 1) // block
    return needs.clamp(max=limit), needs > limit


#: Pairs of a block, evenly spaced on its diagonal, at which a change of the logits is asked for where none is named.
SAMPLES = 4


def change_of_logits(grid: Grid, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pointwise score change as estimators apply it: at their own positions, or to the logits of whole blocks.

    Args:
        grid: The site's blocks.
        score: ``(logits, b, h, q, kv) -> logits`` over broadcastable indices.

    Returns:
        A function of float32 (..., B, Hq, NQ, NK) logits. With ``q`` and ``kv``, int64 positions that broadcast to
        them, it is exact. Without, NQ and NK are all blocks, and a block's logit becomes the mean, as softmax takes
        it, of what some of its pairs would make of it. Our choice: a block all of whose sampled pairs are forbidden
        keeps its logit, because others may not be.
    """
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1, 1)
    first_q = torch.arange(grid.q_blocks, device=grid.device).view(1, 1, -1, 1) * grid.block
    first_kv = torch.arange(grid.kv_blocks, device=grid.device).view(1, 1, 1, -1) * grid.kv_block

    def at_samples(logits: Tensor) -> Tensor:
        total = None
        for sample in range(SAMPLES):
            of_q, of_kv = ((2 * sample + 1) * side // (2 * SAMPLES) for side in (grid.block, grid.kv_block))
            q, kv = (first_q + of_q).clamp(max=grid.q_len - 1), (first_kv + of_kv).clamp(max=grid.kv_len - 1)
            changed = score(logits, b, h, q, kv).expand_as(logits)
            total = changed if total is None else torch.logaddexp(total, changed)
        assert total is not None
        return torch.where(total > FORBIDDEN, total - math.log(SAMPLES), logits)

    def adjusted(logits: Tensor, *, q: Tensor | None = None, kv: Tensor | None = None) -> Tensor:
        if q is None or kv is None:
            return at_samples(logits)
        changed: Tensor = score(logits, b, h, q, kv).expand_as(logits)
        return changed

    return adjusted

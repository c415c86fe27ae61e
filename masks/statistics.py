"""What a selection leaves behind for ``collect_stats``: a row of numbers and a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.last_rows import BLOCKS
from omnisparse_flex.masks.blocks.mean_pool import for_exact_products
from omnisparse_flex.masks.blocks.peak_rows import ROWS
from omnisparse_flex.masks.blocks.select import BLOCK, COSTS, BlockSelection, scoring_cost
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.masks.tokens.key_bits import blocks_of_bits
from omnisparse_flex.masks.tokens.segments import tokens_of_blocks
from omnisparse_flex.masks.tokens.select import TokenSelection, kept_pairs

#: Columns of the statistics tensor, in order; shares are 0-1.
STATS = (
    "kept_blocks",
    "allowed_blocks",
    "budget",
    "active_share",
    "discarded_share",
    "flattest_head",
    "estimated_recall",
    "worst_estimated_recall",
    "overflow_rows",
    "selection_blocks",
)
#: Values of a block map.
EMPTY, SELECTED, FORCED = 0, 1, 2


class SelectionStats(NamedTuple):
    """What one site's selection leaves behind.

    Attributes:
        stats: float32 (len(STATS),).
        block_map: uint8 (Hq, NQ, NK), the first batch row's blocks; of tokens (Hc, NQ, NK), see ``TokenSelection``.
        recalls: float32 (2, Hq), mean and minimum true recall; (2, 0) unless asked for.
    """

    stats: Tensor
    block_map: Tensor
    recalls: Tensor


@torch.no_grad()
def measure_selection(
    selection: BlockSelection | TokenSelection,
    query: Tensor,
    key: Tensor,
    mask: IndexMask | OpaqueMask,
    config: OmniSparseConfig,
    *,
    scale: float,
    score: Callable[..., Tensor] | None,
    exact: bool,
) -> SelectionStats:
    """Record a selection.

    Args:
        selection: What was kept.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        config: The rules that it was made by.
        scale: Logit scale.
        score: ``(logits, b, h, q, kv) -> logits``, the model's own change, or None.
        exact: Also compute the true recall of sampled rows.

    Returns:
        The record. ``kept_blocks`` and ``allowed_blocks`` are means over batch and the heads that choose of
        the number of block pairs, however wide (a token pair counts 1 / BLOCK^2); ``selection_blocks`` is the
        selection's own cost in the same unit; ``budget`` is the mean number of blocks beyond the
        always-kept ones of an active row (segment); ``discarded_share`` is that of the lazy rows;
        the recall is the estimator's own (uncalibrated).
    """
    rows = sampled_rows(query)
    if isinstance(selection, BlockSelection):
        values, block_map = _block_stats(selection, config), _block_map(selection, config.split)
        kept = _kept_by_blocks(selection, rows, key.shape[2], BLOCK // config.split) if exact else None
    else:
        values, block_map = _token_stats(selection, config, key), _token_block_map(selection, config)
        kept = kept_pairs(selection, rows, key.shape[2], config, BLOCK) if exact else None
    recalls = torch.zeros((2, 0), device=query.device)
    if kept is not None:
        recalls = true_recall(kept, rows, query, key, mask, scale, score)
    return SelectionStats(torch.stack([value.to(torch.float32) for value in values]), block_map, recalls)


def _block_stats(selection: BlockSelection, config: OmniSparseConfig) -> tuple[Tensor, ...]:
    batch, heads = selection.keep.shape[:2]
    rows = selection.layout.some.any(-1).expand(batch, heads, -1)
    active = selection.active & rows
    lazy = selection.lazy & rows
    recall = selection.recall
    allowed = selection.layout.some.expand_as(selection.keep).sum() / (batch * heads)
    cost = scoring_blocks(selection, config, allowed)
    return (
        selection.keep.sum() / (batch * heads),
        allowed,
        (selection.budget * active).sum() / active.sum().clamp(min=1) / config.split,
        active.sum() / rows.sum().clamp(min=1),
        (lazy & ~selection.active).sum() / lazy.sum().clamp(min=1),
        (selection.needs * active).sum((0, 2)).argmax(),
        (recall * rows).sum() / rows.sum().clamp(min=1),
        torch.where(rows, recall, 1.0).amin(),
        selection.overflow.sum(),
        cost,
    )


def scoring_blocks(selection: BlockSelection, config: OmniSparseConfig, allowed: Tensor) -> Tensor:
    """What choosing cost, in blocks that attention computes; the peak rule counts the blocks whose keys it takes."""
    if config.budget == "peak":
        batch, heads = selection.keep.shape[:2]
        means = allowed * COSTS["mean_pool"] * ROWS * config.split  # of every row, over the means of the keys
        return selection.scored.sum() / (batch * heads) * scoring_cost(config) + means
    return allowed * scoring_cost(config) + _last_rows(selection, config)


def _last_rows(selection: BlockSelection, config: OmniSparseConfig) -> Tensor:
    """Products of the exact rows: half of what attention computes for a pair, for some rows of two blocks."""
    pairs = selection.layout.some[:, :, -BLOCKS:].expand_as(selection.keep[:, :, -BLOCKS:]).sum()
    batch, heads = selection.keep.shape[:2]
    return pairs / (batch * heads) * (0.5 * min(config.last_rows // BLOCKS, BLOCK) / BLOCK)


def _token_stats(selection: TokenSelection, config: OmniSparseConfig, key: Tensor) -> tuple[Tensor, ...]:
    segments = selection.segments
    # Segments of padding have active rows that see nothing.
    size, is_active = selection.row_count.shape[:2].numel(), (selection.row_count > 0) & (selection.mass > 0)
    pairs = size * BLOCK * BLOCK * (selection.rows.shape[-1] // config.segment_size)
    eligible = tokens_of_blocks(segments.eligible, BLOCK, key.shape[2]).sum(-1).expand_as(selection.key_count)
    wide = (*selection.row_count.shape[:2], *segments.some.shape[2:])
    fetched = (selection.row_count * selection.key_count).sum() / pairs
    # Scores of every active row with every eligible key: half of what attention computes for a pair, if not narrow.
    width = 1.0 if config.scoring_dims is None else config.scoring_dims / key.shape[3]
    scored = (selection.row_count * eligible).sum() / pairs / 2 * width
    mass = torch.where(is_active, selection.mass, 1.0)
    lazy = selection.lazy.sum().clamp(min=1)
    return (
        segments.near.expand(wide).sum() / size + fetched,
        segments.some.expand(wide).sum() / size,
        (selection.key_count * is_active).sum() / is_active.sum().clamp(min=1) / BLOCK,
        selection.active.float().mean(),
        (selection.lazy & ~selection.active).sum() / lazy,
        (selection.needs * is_active).sum((0, 2)).argmax(),
        (selection.mass * is_active).sum() / is_active.sum().clamp(min=1),
        mass.amin(),
        selection.overflow.sum(),
        scored,
    )


def _block_map(selection: BlockSelection, split: int) -> Tensor:
    """Squares: a cell of narrow key blocks says the most that one of them has."""
    block_map = selection.keep[0].to(torch.uint8) * SELECTED
    block_map = torch.where(selection.layout.forced[0].expand_as(block_map.bool()), FORCED, block_map).to(torch.uint8)
    return (
        block_map
        if split == 1
        else F.pad(block_map, (0, -block_map.shape[-1] % split)).unflatten(-1, (-1, split)).amax(-1)
    )


def _token_block_map(selection: TokenSelection, config: OmniSparseConfig) -> Tensor:
    """A block counts as selected where at least one of its tokens is fetched."""
    near = selection.segments.near[0].expand(selection.chosen.shape[1], -1, -1)
    hits = blocks_of_bits(selection.chosen[0], BLOCK)
    block_map = hits.repeat_interleave(config.segment_size // BLOCK, 1)[:, : near.shape[1]].to(torch.uint8) * SELECTED
    return torch.where(near, FORCED, block_map).to(torch.uint8)


def _kept_by_blocks(selection: BlockSelection, rows: Tensor, kv_len: int, key_block: int) -> Tensor:
    # Realized in between: Inductor cannot bound an index into an index.
    kept = torch.ops.omnisparse.realize(selection.keep.index_select(2, rows // BLOCK))
    keys: Tensor = kept.index_select(3, torch.arange(kv_len, device=kept.device) // key_block)
    return keys


#: Query rows whose true attention is computed for ``true_recall``.
SAMPLED_ROWS = 32


def sampled_rows(query: Tensor) -> Tensor:
    """The query indices, evenly spaced, whose true attention is computed: int64 (SAMPLED_ROWS,)."""
    steps = torch.arange(SAMPLED_ROWS, device=query.device)
    rows: Tensor = torch.ops.omnisparse.realize(((steps + 1) * query.shape[2] // SAMPLED_ROWS - 1).clamp(min=0))
    return rows


def true_recall(
    kept: Tensor,
    rows: Tensor,
    query: Tensor,
    key: Tensor,
    mask: IndexMask | OpaqueMask,
    scale: float,
    score: Callable[..., Tensor] | None,
) -> Tensor:
    """Softmax mass that a selection really keeps, from exact rows.

    Args:
        kept: bool (B, Hq, P, S), what the rows keep, the model's own mask aside.
        rows: int64 (P,), query indices.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        scale: Logit scale.
        score: The model's own change of the logits, or None.

    Returns:
        float32 (2, Hq): mean and minimum over batch and rows that see any key.
    """
    batch, heads, _, _ = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    b = torch.arange(batch, device=query.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=query.device).view(1, -1, 1, 1)
    q, kv = rows.view(1, 1, -1, 1), torch.arange(kv_len, device=query.device).view(1, 1, 1, -1)
    sampled = query.index_select(2, rows).unflatten(1, (-1, groups))
    logits = (for_exact_products(sampled) @ for_exact_products(key).unsqueeze(2).transpose(-1, -2)).flatten(
        1, 2
    ).float() * scale
    if score is not None:
        logits = score(logits, b, h, q, kv)
    allowed = mask.pairs(b, h, q, kv).to(torch.bool).expand(batch, heads, -1, kv_len)
    mass = torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1).masked_fill(~allowed, 0.0)
    recall = (mass * kept).sum(-1)
    sees = allowed.any(-1)
    mean = (recall * sees).sum((0, 2)) / sees.sum((0, 2)).clamp(min=1)
    return torch.stack([mean, torch.where(sees, recall, 1.0).amin((0, 2))])

"""Block selection: the map of key blocks that each query block keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.budget import keep_top, need, rank, shared_budget
from omnisparse_flex.masks.interval import Grid, any_in_blocks
from omnisparse_flex.masks.mean_pool import block_mean, mean_pool
from omnisparse_flex.masks.opaque import OpaqueMask
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.queries import active_rows

#: Side of a block, in tokens: the only size that the sm90 backward takes (DESIGN, FACTS).
BLOCK = 128

SCORERS = {"mean_pool": mean_pool}


@dataclasses.dataclass(frozen=True, slots=True)
class BlockSelection:
    """What one attention site keeps; the head axis is that of the KV heads.

    Attributes:
        keep: bool (B, Hkv, NQ, NK), the blocks to compute.
        full: bool (B or 1, Hkv or 1, NQ, NK), blocks wholly allowed by the model's mask.
        some: bool (B or 1, Hkv or 1, NQ, NK), blocks with possibly allowed pairs.
        forced: bool (B, Hkv or 1, NQ, NK), sinks, window and text blocks.
        mass: float32 (B, Hkv, NQ, NK), the estimate.
        needs: int64 (B, Hkv, NQ), blocks each head would need.
        budget: int64 (B, Hkv, NQ), blocks each head got, at most ``max_kv_budget``.
        active: bool (B, Hkv, NQ).
        lazy: bool (B, Hkv, NQ).
        overflow: bool (B, Hkv, NQ), rows whose need exceeded ``max_kv_budget``.
    """

    keep: Tensor
    full: Tensor
    some: Tensor
    forced: Tensor
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
    mask: MaskProgram | OpaqueMask,
    config: OmniSparseConfig,
    *,
    target: Tensor | float,
    scale: float,
    visual: Tensor | None = None,
    q_offset: Tensor | int = 0,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> BlockSelection:
    """Choose the key blocks of every query block.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        config: Rules; its ``target_recall`` is ignored in favour of ``target``.
        target: Recall to keep, number or 0-d tensor.
        scale: Logit scale.
        visual: bool (B, S), tokens eligible for selection; the others are always kept. A
            row without visual tokens, or None: every token is eligible.
        q_offset: Position of query 0 among the keys, int or 0-d int tensor.
        adjust: The model's own change of the logits at block centres; see ``at_centres``.

    Returns:
        The selection; a pure function of its inputs, without gradients.

    Source: PAPER "KV selection" and "Query selection" at block granularity.
    """
    grid = Grid(query.shape[0], query.shape[1], query.shape[2], key.shape[2], BLOCK, query.device)
    kv_heads = key.shape[1]
    full, some = (_per_group(x, kv_heads, how) for x, how in zip(mask.bounds(grid), ("all", "any"), strict=True))
    near = some & (_window_blocks(grid, q_offset, config.window_size) | _first_blocks(some, sink_blocks(mask, config)))
    text_keys, text_rows = _text_blocks(visual, grid, q_offset)
    forced = some & (near | text_keys | _rescue(mask, some, grid, q_offset, kv_heads))

    mass = SCORERS[config.scoring](query, key, some, scale=scale, block=BLOCK, adjust=adjust)
    local_mass = (mass * near).sum(-1)
    pooled = block_mean(query, BLOCK).unflatten(1, (kv_heads, -1))
    active, lazy = active_rows(pooled, local_mass, text_rows, config.lazy_threshold)

    eligible = some & ~forced
    sorted_mass, order = rank(mass, eligible)
    needs = need(sorted_mass, (mass * forced).sum(-1), eligible.sum(-1), target)
    needs, overflow = _capped(needs, config.max_kv_budget)
    budget = shared_budget(needs, active, _blocks_of(config.budget))
    keep = forced | keep_top(order, eligible, budget)
    return BlockSelection(keep, full, some, forced, mass, needs, budget, active, lazy, overflow & active)


def dense_selection(query: Tensor, key: Tensor, mask: MaskProgram | OpaqueMask) -> tuple[Tensor, Tensor]:
    """``(keep, full)`` maps that keep everything the mask allows; (1 or B, 1 or Hkv, NQ, NK)."""
    grid = Grid(query.shape[0], query.shape[1], query.shape[2], key.shape[2], BLOCK, query.device)
    full, some = mask.bounds(grid)
    return _per_group(some, key.shape[1], "any"), _per_group(full, key.shape[1], "all")


def sink_blocks(mask: MaskProgram | OpaqueMask, config: OmniSparseConfig) -> int:
    """Leading allowed blocks that surely hold the first ``sink_size`` allowed keys of a row.

    One block more when the mask reads a captured tensor: padding or packing then may put
    the first allowed key anywhere inside its block.
    """
    if config.sink_size == 0:
        return 0
    return (config.sink_size + BLOCK - 1) // BLOCK + mask.starts_anywhere


def _first_blocks(some: Tensor, count: int) -> Tensor:
    return some.cumsum(-1) <= count


def _per_group(x: Tensor, kv_heads: int, how: str) -> Tensor:
    """Reduce a per-query-head map to KV heads, if the mask distinguishes heads at all."""
    if x.shape[1] == 1:
        return x
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped.all(2) if how == "all" else grouped.any(2)


def _window_blocks(grid: Grid, q_offset: Tensor | int, window: int) -> Tensor:
    """Blocks within ``window`` tokens of a query, on both sides; (NQ, NK)."""
    first_q = torch.arange(grid.q_blocks, device=grid.device)[:, None] * grid.block + q_offset
    first_k = torch.arange(grid.kv_blocks, device=grid.device) * grid.block
    # Queries past the last key (cross attention) count as sitting at it, as in _own_positions.
    reaches_back = first_k + grid.block > first_q.clamp(max=grid.kv_len - 1) - window + 1
    return reaches_back & (first_k < first_q + grid.block + window - 1)


def _text_blocks(visual: Tensor | None, grid: Grid, q_offset: Tensor | int) -> tuple[Tensor, Tensor]:
    """Blocks with a text key, (B or 1, 1, 1, NK), and query blocks with a text query, (B or 1, 1, NQ)."""
    if visual is None:
        nothing = torch.zeros((1, 1, 1), dtype=torch.bool, device=grid.device)
        return nothing.unsqueeze(-1), nothing
    text = ~visual & visual.any(-1, keepdim=True)
    text_rows = text.index_select(1, _own_positions(grid, q_offset))
    key_blocks = any_in_blocks(text, 1, grid.kv_blocks, grid.block)[:, None, None]
    return key_blocks, any_in_blocks(text_rows, 1, grid.q_blocks, grid.block)[:, None]


def _rescue(mask: MaskProgram | OpaqueMask, some: Tensor, grid: Grid, q_offset: Tensor | int, kv_heads: int) -> Tensor:
    """Blocks that a query needs lest it lose every key: only rows whose own key is masked can.

    Rows that may see their own position are covered by the window. For the others (padded
    queries) the first allowed block is enough when the mask is causal and otherwise a
    matter of keys alone; under any other mask the whole row of blocks stays
    (``MaskProgram.blind_rows_need``).

    Returns:
        bool (B or 1, Hkv or 1, NQ, NK).
    """
    if mask.blind_rows_need == "nothing":
        return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=grid.device)
    blind = _blind_rows(mask, grid, q_offset, kv_heads)[..., None]
    return blind & (_first_blocks(some, 1) if mask.blind_rows_need == "first" else some)


def _blind_rows(mask: MaskProgram | OpaqueMask, grid: Grid, q_offset: Tensor | int, kv_heads: int) -> Tensor:
    """Query blocks with a query that may not see its own position; (B or 1, Hkv or 1, NQ)."""
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1)
    q = torch.arange(grid.q_len, device=grid.device).view(1, 1, -1)
    own = _own_positions(grid, q_offset).view(1, 1, -1)
    blind = ~mask.pairs(b, h, q, own).to(torch.bool)
    blocks = any_in_blocks(blind, blind.dim() - 1, grid.q_blocks, grid.block)
    return blocks if blocks.shape[1] == 1 else blocks.unflatten(1, (kv_heads, -1)).any(2)


def _own_positions(grid: Grid, q_offset: Tensor | int) -> Tensor:
    """Key position of each query, (L,); outside the keys (L > S), the nearest one."""
    positions = (torch.arange(grid.q_len, device=grid.device) + q_offset).clamp(min=0, max=grid.kv_len - 1)
    # Realized: Inductor fails to bound an indirect index that it can follow back to a clamp.
    own: Tensor = torch.ops.omnisparse.realize(positions)
    return own


def _blocks_of(budget: str | int) -> str | int:
    """A token budget in blocks, rounded up; rule names pass through."""
    return budget if isinstance(budget, str) else (budget + BLOCK - 1) // BLOCK


def _capped(needs: Tensor, max_kv_budget: int | None) -> tuple[Tensor, Tensor]:
    if max_kv_budget is None:
        return needs, torch.zeros_like(needs, dtype=torch.bool)
    limit = (max_kv_budget + BLOCK - 1) // BLOCK
    return needs.clamp(max=limit), needs > limit


def at_centres(grid: Grid, score: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A pointwise score change, applied to block logits as if each block were its middle pair.

    Our choice: exact for biases linear in the distance, and block means resolve no more.

    Args:
        grid: The site's blocks.
        score: ``(logits, b, h, q, kv) -> logits`` over broadcastable indices.

    Returns:
        A function of float32 (B, Hq, NQ, NK) logits.
    """
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1, 1)
    q = torch.arange(grid.q_blocks, device=grid.device).view(1, 1, -1, 1) * grid.block + grid.block // 2
    kv = torch.arange(grid.kv_blocks, device=grid.device).view(1, 1, 1, -1) * grid.block + grid.block // 2
    q, kv = q.clamp(max=grid.q_len - 1), kv.clamp(max=grid.kv_len - 1)
    return lambda logits: score(logits, b, h, q, kv).expand_as(logits)

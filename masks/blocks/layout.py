"""What one attention site keeps whatever its queries and keys hold: the mask's own blocks, sinks, window, text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.text_runs import text_blocks
from omnisparse_flex.masks.expr.block_bounds import Grid, any_in_blocks
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask


class Layout(NamedTuple):
    """Block maps that follow from the mask, the lengths and the visual tokens alone.

    Layers with one mask share one layout. The head axis is that of the query heads, 1 where
    the mask does not distinguish heads.

    Attributes:
        full: bool (B or 1, Hq or 1, NQ, NK), blocks wholly allowed by the model's mask.
        some: bool (B or 1, Hq or 1, NQ, NK), blocks with possibly allowed pairs.
        near: bool (B or 1, Hq or 1, NQ, NK), sinks and window.
        forced: bool (B or 1, Hq or 1, NQ, NK), always kept: ``near``, text (``text_blocks``),
            and what keeps a row from losing every key.
        eligible: bool (B or 1, Hq or 1, NQ, NK), blocks to choose from.
        text_rows: bool (B or 1, 1, NQ), query blocks with a query of text that is always kept.
    """

    full: Tensor
    some: Tensor
    near: Tensor
    forced: Tensor
    eligible: Tensor
    text_rows: Tensor


@torch.no_grad()
def block_layout(
    mask: IndexMask | OpaqueMask,
    grid: Grid,
    config: OmniSparseConfig,
    *,
    visual: Tensor | None = None,
    q_offset: Tensor | int = 0,
) -> Layout:
    """The layout of one site.

    Args:
        mask: The model's own mask.
        grid: The site's blocks.
        config: Rules: sinks and window.
        visual: bool (B, S), visual tokens; None: every token is eligible.
        q_offset: Position of query 0 among the keys, int or 0-d int tensor.

    Returns:
        The layout.

    Source: PAPER "KV selection": sinks, the local window and text keys are always kept. Our choice: which text,
    see ``text_blocks``.
    """
    full, some = mask.bounds(grid)
    near = some & (
        _window_blocks(grid, q_offset, config.window_size) | _first_blocks(some, sink_blocks(mask, config, grid))
    )
    text = text_blocks(visual, grid, own_positions(grid, q_offset))
    forced = near | (some & (text.keys | _rescue(mask, some, grid, q_offset)))
    return Layout(full, some, near, forced, some & ~forced, text.rows)


def sink_blocks(mask: IndexMask | OpaqueMask, config: OmniSparseConfig, grid: Grid) -> int:
    """Leading allowed blocks that surely hold the first ``sink_size`` allowed keys of a row.

    One block more when the mask reads a captured tensor: padding or packing then may put
    the first allowed key anywhere inside its block.
    """
    if config.sink_size == 0:
        return 0
    blocks = (config.sink_size + grid.kv_block - 1) // grid.kv_block
    return blocks + 1 if mask.first_key_unaligned else blocks


def _first_blocks(some: Tensor, count: int) -> Tensor:
    return some.cumsum(-1) <= count


def _window_blocks(grid: Grid, q_offset: Tensor | int, window: int) -> Tensor:
    """Blocks within ``window`` tokens of a query, on both sides; (NQ, NK)."""
    first_q = torch.arange(grid.q_blocks, device=grid.device)[:, None] * grid.block + q_offset
    first_k = torch.arange(grid.kv_blocks, device=grid.device) * grid.kv_block
    # Queries past the last key (cross attention) count as sitting at it, as in own_positions.
    reaches_back = first_k + grid.kv_block > first_q.clamp(max=grid.kv_len - 1) - window + 1
    return reaches_back & (first_k < first_q + grid.block + window - 1)


def _rescue(mask: IndexMask | OpaqueMask, some: Tensor, grid: Grid, q_offset: Tensor | int) -> Tensor:
    """Blocks that a query needs lest it lose every key: only rows whose own key is masked can.

    Rows that may see their own position are covered by the window. For the others (padded
    queries) the first allowed block is enough when the mask is causal and otherwise a
    matter of keys alone: bounds are exact in those (``terms.mask_bounds``). Under any other mask the
    whole row of blocks stays (``IndexMask.rescue_blocks``).

    Args:
        mask: The model's own mask.
        some: bool (B or 1, Hq or 1, NQ, NK), blocks that may hold an allowed pair.
        grid: The site's blocks.
        q_offset: Position of query 0.

    Returns:
        bool (B or 1, Hq or 1, NQ, NK).
    """
    if mask.rescue_blocks == "none":
        return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=grid.device)
    blind = _blind_rows(mask, grid, q_offset)[..., None]
    return blind & (_first_blocks(some, 1) if mask.rescue_blocks == "first" else some)


def _blind_rows(mask: IndexMask | OpaqueMask, grid: Grid, q_offset: Tensor | int) -> Tensor:
    """Query blocks with a query that may not see its own position; (B or 1, Hq or 1, NQ)."""
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1)
    q = torch.arange(grid.q_len, device=grid.device).view(1, 1, -1)
    own = own_positions(grid, q_offset).view(1, 1, -1)
    blind = ~mask.pairs(b, h, q, own).to(torch.bool)
    return any_in_blocks(blind, blind.dim() - 1, grid.q_blocks, grid.block)


def own_positions(grid: Grid, q_offset: Tensor | int) -> Tensor:
    """Key position of each query, (L,); outside the keys (L > S), the nearest one."""
    positions = (torch.arange(grid.q_len, device=grid.device) + q_offset).clamp(min=0, max=grid.kv_len - 1)
    # Realized: Inductor fails to bound an indirect index that it can follow back to a clamp.
    own: Tensor = torch.ops.omnisparse.realize(positions)
    return own

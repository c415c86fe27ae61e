"""What one attention site keeps whatever its queries and keys hold: the mask's own blocks, sinks, window, text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.expr.block_bounds import Grid, any_in_blocks
from omnisparse_flex.masks.expr.opaque import OpaqueMask
from omnisparse_flex.masks.expr.program import MaskProgram


class Layout(NamedTuple):
    """Block maps that follow from the mask, the lengths and the visual tokens alone.

    Layers with one mask share one layout. The head axis is that of the KV heads, 1 where
    the mask does not distinguish heads.

    Attributes:
        full: bool (B or 1, Hkv or 1, NQ, NK), blocks wholly allowed by the model's mask.
        some: bool (B or 1, Hkv or 1, NQ, NK), blocks with possibly allowed pairs.
        near: bool (B or 1, Hkv or 1, NQ, NK), sinks and window.
        forced: bool (B or 1, Hkv or 1, NQ, NK), always kept: ``near``, text keys, and what
            keeps a row from losing every key.
        eligible: bool (B or 1, Hkv or 1, NQ, NK), blocks to choose from.
        text_rows: bool (B or 1, 1, NQ), query blocks with a text token.
    """

    full: Tensor
    some: Tensor
    near: Tensor
    forced: Tensor
    eligible: Tensor
    text_rows: Tensor


@torch.no_grad()
def block_layout(
    mask: MaskProgram | OpaqueMask,
    grid: Grid,
    kv_heads: int,
    config: OmniSparseConfig,
    *,
    visual: Tensor | None = None,
    q_offset: Tensor | int = 0,
) -> Layout:
    """The layout of one site.

    Args:
        mask: The model's own mask.
        grid: The site's blocks.
        kv_heads: Number of KV heads.
        config: Rules: sinks and window.
        visual: bool (B, S), tokens eligible for selection; the others are always kept. A
            row without visual tokens, or None: every token is eligible.
        q_offset: Position of query 0 among the keys, int or 0-d int tensor.

    Returns:
        The layout.

    Source: PAPER "KV selection": sinks, the local window and text keys are always kept.
    """
    full, some = mask_blocks(mask, grid, kv_heads)
    near = some & (
        _window_blocks(grid, q_offset, config.window_size) | _first_blocks(some, sink_blocks(mask, config, grid))
    )
    text_keys, text_rows = _text_blocks(visual, grid, q_offset)
    forced = near | (some & (text_keys | _rescue(mask, some, grid, q_offset, kv_heads)))
    return Layout(full, some, near, forced, some & ~forced, text_rows)


def mask_blocks(mask: MaskProgram | OpaqueMask, grid: Grid, kv_heads: int) -> tuple[Tensor, Tensor]:
    """``(full, some)`` of the model's own mask for each KV head; bool (B or 1, Hkv or 1, NQ, NK)."""
    full, some = mask.bounds(grid)
    return _per_group(full, kv_heads, "all"), _per_group(some, kv_heads, "any")


def sink_blocks(mask: MaskProgram | OpaqueMask, config: OmniSparseConfig, grid: Grid) -> int:
    """Leading allowed blocks that surely hold the first ``sink_size`` allowed keys of a row.

    One block more when the mask reads a captured tensor: padding or packing then may put
    the first allowed key anywhere inside its block.
    """
    if config.sink_size == 0:
        return 0
    blocks = (config.sink_size + grid.block - 1) // grid.block
    return blocks + 1 if mask.starts_anywhere else blocks


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

"""The terms of a mask that are a matter of keys: their value at every key, and exact bounds over blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.expr.block_bounds import Grid, all_in_blocks, any_in_blocks, block_bounds
from omnisparse_flex.masks.expr.expr import TRUE, Expr, Index, Load, axes, conjunction, conjuncts, evaluate, plain_load


def mask_bounds(expr: Expr, buffers: Sequence[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """``block_bounds``, exact in what is a matter of batch, head and key alone.

    A block of keys that "may hold" an allowed one then does, so that the first such block keeps a row alive.

    Args:
        expr: A boolean expression.
        buffers: The captured tensors that its loads refer to.
        grid: Lengths and block size.

    Returns:
        As ``block_bounds``.
    """
    of_keys, others = split_terms(expr, ("b", "h", "kv"))
    if of_keys == TRUE or _is_pooled_exactly(of_keys):
        return block_bounds(expr, buffers, grid)
    full, some = block_bounds(others, buffers, grid)
    allowed = keys_allowed(of_keys, buffers, grid.batch, grid.heads, grid.kv_len, grid.device).unsqueeze(2)
    whole = all_in_blocks(allowed, 3, grid.kv_blocks, grid.kv_block)
    return full & whole, some & any_in_blocks(allowed, 3, grid.kv_blocks, grid.kv_block)


def split_terms(expr: Expr, coordinates: tuple[str, ...]) -> tuple[Expr, Expr]:
    """``expr`` as the conjunction of two: the terms of these coordinates (keys among them), and the others."""
    inside: list[Expr] = []
    outside: list[Expr] = []
    for part in conjuncts(expr):
        needed = axes(part)
        (inside if "kv" in needed and needed <= set(coordinates) else outside).append(part)
    return conjunction(*inside), conjunction(*outside)


def keys_allowed(
    expr: Expr, buffers: Sequence[Tensor], batch: int, heads: int, kv_len: int, device: torch.device
) -> Tensor:
    """The value of a boolean expression of batch, head and key at every key: bool (B or 1, H or 1, S)."""
    b = torch.arange(batch, device=device).view(-1, 1, 1)
    h = torch.arange(heads, device=device).view(1, -1, 1)
    # Realized: Inductor fails to bound an indirect index that it can follow back to where positions were made.
    kv = torch.ops.omnisparse.realize(torch.arange(kv_len, device=device)).view(1, 1, -1)
    value = evaluate(expr, plain_load(buffers), b, h, torch.zeros_like(kv), kv).to(torch.bool)
    full: Tensor = value.expand(torch.broadcast_shapes(value.shape, (1, 1, kv_len)))
    return full


def _is_pooled_exactly(expr: Expr) -> bool:
    """Whether bounds over blocks are exact as they are: a captured bool tensor read at plain coordinates."""
    return isinstance(expr, Load) and all(isinstance(index, Index) for index in expr.at)

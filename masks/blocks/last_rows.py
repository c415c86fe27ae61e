"""Exact rows at the end of a prompt: where a question stands, block means of its unlike words resolve nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.blocks.block_lse import block_lse
from omnisparse_flex.masks.blocks.mean_pool import for_exact_products
from omnisparse_flex.masks.blocks.row_mass import key_units, normalised, within
from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask

#: Query blocks that the rows are spread over: a question may straddle the edge between two.
BLOCKS = 2


def with_last_rows(
    mass: Tensor,
    query: Tensor,
    key: Tensor,
    some: Tensor,
    count: int,
    *,
    scale: float,
    block: int,
    key_block: int,
    adjust: Callable[..., Tensor] | None,
    mask: IndexMask | OpaqueMask,
) -> Tensor:
    """Replace the estimate of the last query blocks by exact softmax rows of some of their queries.

    Args:
        mass: float32 (B, Hq, NQ, NK), what an estimator gave.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        some: bool (B or 1, Hq or 1, NQ, NK); blocks with no allowed pair have zero mass.
        count: Rows in all, a multiple of ``BLOCKS``, evenly spaced within what each block holds.
        scale: Logit scale.
        block: Tokens per query block.
        key_block: Tokens per key block.
        adjust: The model's own change of the logits at given positions, see ``Scorer``, or None.
        mask: The model's own mask.

    Returns:
        float32 (B, Hq, NQ, NK). Where the mask is plain and logits are products alone, nothing larger than the
        result is in memory on a GPU; else the products, B * Hq * ``count`` * S elements in the queries' dtype.

    Source: the last queries as a sample of what a prompt looks for: MInference, arXiv
    2407.02490 (64 of them), FlexPrefill, arXiv 2502.20766. Our choice: two blocks of
    queries, because the last one may hold but a few tokens.
    """
    length, blocks = query.shape[2], mass.shape[2]
    last = min(BLOCKS, blocks)
    rows, new = _positions(length, blocks - last, last, min(count // BLOCKS, block), block, query.device)
    vectors = query.index_select(2, rows.flatten())
    plain = as_causal_padding(mask, query.shape[0], key.shape[2], query.device) if adjust is None else None
    if plain is None:
        lse = _lse_by_pairs(vectors, key, rows, scale, key_block, adjust, mask.pairs)
    else:
        last_key = torch.full_like(rows, key.shape[2] - 1)
        seen_to = last_key if plain.offset is None else rows + plain.offset
        lse = block_lse(vectors, key, seen_to.flatten(), plain.real, scale, key_block).unflatten(2, rows.shape)

    below = some[:, :, blocks - last :]
    lse = lse.masked_fill(~(below.unsqueeze(2) & new.unsqueeze(-1)), float("-inf"))
    exact = normalised(torch.softmax(lse, dim=-1).nan_to_num(0.0).sum(2), below)
    # Realized: Inductor would shift the maps that it fuses into a concatenation, and fail to compare their indices.
    joined: Tensor = torch.ops.omnisparse.realize(torch.cat((mass[:, :, : blocks - last], exact), dim=2))
    return joined


def _lse_by_pairs(
    vectors: Tensor,
    key: Tensor,
    rows: Tensor,
    scale: float,
    block: int,
    adjust: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """``block_lse`` under any mask and change of the logits: (B, Hq, R, last, NK) for (B, Hq, R * last, D) vectors."""
    batch, heads = vectors.shape[:2]
    kv_heads = key.shape[1]
    units = key_units(key, block, 1)
    grouped = vectors.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    logits = (for_exact_products(grouped) @ for_exact_products(units.vectors).transpose(-1, -2)).unflatten(
        -1, (-1, block)
    )
    logits = logits.unflatten(2, (heads // kv_heads, *rows.shape))
    # Rows and the keys of a block first: (R, block, B, Hq, last, NK), to which a change of the logits broadcasts.
    logits = logits.permute(3, 6, 0, 1, 2, 4, 5).flatten(3, 4).float() * scale
    # Each row by its position and each key by its own: a change of the logits sees what attention sees.
    places = rows.view(-1, 1, 1, 1, rows.shape[1], 1)
    if adjust is not None:
        logits = adjust(logits, q=places, kv=units.positions)
    b = torch.arange(batch, device=key.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=key.device).view(-1, 1, 1)
    pairs = allowed(b, h, places, units.positions).to(torch.bool)
    logits = (logits + units.weights).masked_fill(~pairs, float("-inf"))
    return torch.logsumexp(logits, dim=1).permute(1, 2, 0, 3, 4)


def _positions(
    length: int, first: int, count: int, rows: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Evenly spaced rows of some blocks, the last query among them.

    Returns:
        int64 (R, ``count``), positions; bool of the same shape, False where a short block's row stands there again.
    """
    starts = (first + torch.arange(count, device=device)) * block
    held = (length - starts).clamp(max=block)
    ends = torch.arange(rows + 1, device=device).unsqueeze(1) * held // rows
    return within(starts + (ends[1:] - 1).clamp(min=0), length), ends[1:] > ends[:-1]

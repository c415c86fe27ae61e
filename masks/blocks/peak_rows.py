"""A few exact rows of every query block: which rows, their softmax over key blocks, and what block means tell of it.

One row at a time for all query blocks of a call, so that no tensor holds more than a row of each block against all
keys. Rows and blocks are counted in positions of the keys (query i sits at ``i + q_offset``), and no number depends
on a key behind the query block: what a chunk of a prompt selects is what the whole prompt selects there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.blocks.mean_pool import for_exact_products
from omnisparse_flex.masks.blocks.row_mass import within
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask

#: Rows of a block that are sampled. Our choice: half of them cost 1.6 points of perplexity at an equal kept share of
#: SmolLM2 at 8K, twice as many gain nothing at an equal kept share (``benchmarks/results/peak_rule.json``).
ROWS = 16
#: Shift of a row within its stride, by block and head: a fixed stride would meet the same cells of every video frame.
BLOCK_SHIFT, HEAD_SHIFT = 5, 3
#: Order in which a block's strides are filled when more than ``ROWS`` rows are asked for: always far from those before.
PHASES = (0, 4, 2, 6, 1, 5, 3, 7)


class LiveRows(NamedTuple):
    """The queries of each block that see a key.

    Attributes:
        places: int64 (B or 1, Hq or 1, NQ, block), query indices, the live ones first, in order.
        count: int64 (B or 1, Hq or 1, NQ), how many are live.
    """

    places: Tensor
    count: Tensor  # type: ignore[assignment]  # tuples have a method of that name


class Keys(NamedTuple):
    """What rows look at.

    Attributes:
        vectors: (B, Hkv, S, D).
        means: (B, Hkv, NK, D), means over key blocks.
        block: Tokens of a key block.
    """

    vectors: Tensor
    means: Tensor
    block: int


def live_rows(mask: IndexMask | OpaqueMask, grid: Grid, own: Tensor) -> LiveRows:
    """Which queries of each block may see their own position: padding and what lies past the last query may not.

    Args:
        mask: The model's own mask.
        grid: The site's blocks.
        own: int64 (L,), the key position of each query.
    """
    b = torch.arange(grid.batch, device=grid.device).view(-1, 1, 1)
    h = torch.arange(grid.heads, device=grid.device).view(1, -1, 1)
    q = torch.arange(grid.q_len, device=grid.device).view(1, 1, -1)
    live = mask.pairs(b, h, q, own.view(1, 1, -1)).to(torch.bool)
    live = live.expand(*live.shape[:2], grid.q_len).to(torch.int64)
    live = F.pad(live, (0, grid.q_blocks * grid.block - grid.q_len)).unflatten(-1, (grid.q_blocks, grid.block))
    # Each live row's place is the number of live ones before it; the others share one place past the end.
    slot = torch.where(live > 0, live.cumsum(-1) - 1, grid.block)
    rows = torch.arange(grid.q_blocks * grid.block, device=grid.device).view(grid.q_blocks, grid.block).expand_as(live)
    places = torch.zeros((*live.shape[:-1], grid.block + 1), dtype=torch.int64, device=grid.device)
    places = places.scatter(-1, slot, rows)[..., : grid.block]
    return LiveRows(within(places, grid.q_len), live.sum(-1))


def row_of(rows: LiveRows, index: int, phase: int, heads: int, first_block: Tensor | int) -> Tensor:
    """The query that stands for row ``index`` of each block: int64 (B or 1, Hq, NQ).

    Args:
        rows: The live rows.
        index: 0 to ``ROWS`` - 1.
        phase: One of ``PHASES``: which of the rows of a stride.
        heads: Number of query heads.
        first_block: Number of the first query block, in positions of the keys.

    Source: our choice: evenly spaced among the live rows, shifted by block and head. With at most ``ROWS`` live
    rows each is taken, some of them twice.
    """
    blocks, size = rows.places.shape[2:]
    block = torch.arange(blocks, device=rows.places.device) + first_block
    head = torch.arange(heads, device=rows.places.device).unsqueeze(1)
    stride = max(size // ROWS, 1)
    offset = index * size // ROWS + (BLOCK_SHIFT * block + HEAD_SHIFT * head + phase) % stride
    at = offset * rows.count // size
    wide = rows.places.expand(-1, heads, -1, -1)
    return wide.gather(-1, at.expand(wide.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def row_logits(query: Tensor, key: Tensor, places: Tensor, scale: float) -> Tensor:
    """Products of one row of each block with keys (B, Hkv, M, D): float32 (B, Hq, NQ, M).

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, M, D).
        places: int64 (B or 1, Hq, NQ), query indices.
        scale: Logit scale.
    """
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    index = places.expand(batch, -1, -1).unsqueeze(-1).expand(-1, -1, -1, dim)
    rows = query.gather(2, index).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    # In float32, as attention's own logits are.
    products = for_exact_products(rows) @ for_exact_products(key).transpose(-1, -2)
    logits: Tensor = products.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
    return logits.to(torch.float32) * scale


def exact_logs(
    query: Tensor,
    keys: Keys,
    places: Tensor,
    scale: float,
    score: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Log-sum-exp of a row's exact logits over each key block: float32 (B, Hq, NQ, NK), -inf where it sees no key.

    Args:
        query: (B, Hq, L, D).
        keys: The keys.
        places: int64 (B or 1, Hq, NQ), the row of each block.
        scale: Logit scale.
        score: The model's own change of a logit, ``(logits, b, h, q, kv) -> logits``, or None.
        allowed: The model's mask, ``(b, h, q, kv) -> bool``.
    """
    kv_len, device = keys.vectors.shape[2], query.device
    logits = row_logits(query, keys.vectors, places, scale)
    b = torch.arange(query.shape[0], device=device).view(-1, 1, 1, 1)
    h = torch.arange(query.shape[1], device=device).view(1, -1, 1, 1)
    q, kv = places.unsqueeze(-1), torch.arange(kv_len, device=device).view(1, 1, 1, -1)
    if score is not None:
        logits = score(logits, b, h, q, kv)
    logits = logits.masked_fill(~allowed(b, h, q, kv).to(torch.bool), float("-inf"))
    missing = keys.means.shape[2] * keys.block - kv_len
    if not isinstance(missing, int) or missing > 0:
        logits = F.pad(logits, (0, missing), value=float("-inf"))
    logs = torch.logsumexp(logits.unflatten(-1, (keys.means.shape[2], keys.block)), -1)
    realized: Tensor = torch.ops.omnisparse.realize(logs)  # Inductor would fuse all rows of a block into one kernel
    return realized


def pooled_shares(logits: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """A row's softmax between block means, over the blocks that it sees wholly.

    Args:
        logits: float32 (B, Hq, NQ, NK), of means, the log of a block's tokens included.
        whole: bool, broadcastable to it.

    Returns:
        Shares, float32 of the same shape, 0 outside ``whole``; and the log-sum-exp (B, Hq, NQ), -inf without one.
    """
    logits = logits.masked_fill(~whole, float("-inf"))
    total = torch.logsumexp(logits, -1)
    return torch.exp(logits - total.unsqueeze(-1)).nan_to_num(0.0), total

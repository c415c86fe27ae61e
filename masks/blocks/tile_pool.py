"""Attention between means of small tiles: finer than block means, and nearly as cheap."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from omnisparse_flex.masks.blocks.mean_pool import block_mean
from omnisparse_flex.masks.blocks.row_mass import KeyUnits, tile_mass, unit_places, whole_blocks

#: Tokens of a tile. Our choice: tiles of 16 or 8 choose no better (``benchmarks/results/quality_smollm2_blocks.json``).
TILE = 32


def tile_pool(
    query: Tensor,
    key: Tensor,
    some: Tensor,
    *,
    scale: float,
    block: int,
    key_block: int,
    adjust: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
    live: Tensor | None = None,
) -> Tensor:
    """Means of ``TILE`` queries attend to means of ``TILE`` keys.

    A tile of queries goes through a softmax of its own, so that one tile that looks far is not
    hidden by its neighbours, and a key block weighs what its heaviest tiles weigh.

    Args, Returns: see ``Scorer``. ``allowed`` is read at each tile's last query and first live key.

    Source: Our choice, between block means and the tiles of XAttention, arXiv 2503.16428. One
    tile of every query block at a time: B * Hq * NQ * (S / ``TILE``) products are in memory.
    """
    tile = next(side for side in (TILE, 16, 8, 4, 2, 1) if key_block % side == 0)
    vectors = whole_blocks(block_mean(key, tile, live), key_block // tile)
    units = KeyUnits(vectors, *unit_places(key, key_block, tile, live))
    tiles = whole_blocks(block_mean(query, tile), block // tile).unflatten(2, (some.shape[-2], block // tile))
    length = query.shape[2]
    return tile_mass(tiles, units, some, length=length, block=block, scale=scale, adjust=adjust, allowed=allowed)

"""Attention between strided sums: the mean logit of each antidiagonal of small tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from omnisparse_flex.masks.blocks.row_mass import key_units, tile_mass, whole_blocks

#: Side of a tile in tokens. Our choice, one of the two of the source: 1/16 of the exact logits' products.
STRIDE = 16


def antidiagonal(
    query: Tensor,
    key: Tensor,
    some: Tensor,
    *,
    scale: float,
    block: int,
    key_block: int,
    adjust: Callable[[Tensor], Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Every tile of ``STRIDE`` x ``STRIDE`` pairs is judged by the mean logit of its antidiagonal.

    It meets each of the tile's queries and keys once. A row of tiles goes through a softmax;
    its mass is summed over key blocks and averaged over the query block's rows.

    Args, Returns: see ``Scorer``. ``allowed`` is read at each tile's last query and first key.

    Source: PAPER "Scores"; XAttention, arXiv 2503.16428. Our choice: one row of tiles per
    query block at a time, so that no tensor holds all (N / STRIDE)^2 of them.
    """
    stride = math.gcd(key_block, STRIDE)
    units = key_units(key, key_block, stride)
    # Scaled first: a sum of STRIDE unscaled dot products may leave the range of float16.
    tiles = (whole_blocks(query, block) * (scale / stride)).unflatten(2, (some.shape[-2], block // stride, stride))
    tiles, length = tiles.flip(4).flatten(4), query.shape[2]
    return tile_mass(tiles, units, some, length=length, block=block, scale=1.0, adjust=adjust, allowed=allowed)

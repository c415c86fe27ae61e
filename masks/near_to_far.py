"""Next-neighbour attention: a token grid is generated shell by shell, from near to far."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.errors import require
from omnisparse_flex.masks._checks import check_count
from omnisparse_flex.masks._rank import by_rank
from omnisparse_flex.types import MaskMod

ORDERS = ("raster", "shells")


def near_to_far(
    prefix: int,
    frames: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    *,
    order: str = "raster",
) -> MaskMod:
    """A grid token sees the condition prefix and every token no farther from the grid's origin than itself.

    Tokens are the prefix, then the grid (frames, rows, columns). Distance is
    ``t + h + w``, so a Manhattan shell sees itself and every nearer shell, and is
    generated in one pass: ``frames + height + width - 2`` passes for a grid.

    Args:
        prefix: Condition tokens before the grid; 0 for none.
        frames: Grid extent in time; 1 for an image.
        height: Grid rows.
        width: Grid columns.
        device: Where the captured table lives, the queries' device; None: the default.
        order: How the grid's tokens lie: ``"raster"``, or ``"shells"``, the order in which
            they are generated (``near_to_far_order``). In raster order FlexAttention
            computes all blocks of 128 x 128 tokens, in shell order 0.67 of them (32 x 32)
            to 0.55 (64 x 64).

    Returns:
        A ``mask_mod`` over ``prefix + frames * height * width`` queries and keys.

    Raises:
        ConfigError: If ``prefix`` is not an int of at least 0, an extent not one of at
            least 1, or ``order`` unknown.

    Source: NAR, arXiv 2503.10696, near-to-far next-neighbour prediction. Our
    choice: the prefix is causal inside itself and does not see the grid; shell order.
    """
    check_count("prefix", prefix, minimum=0)
    require(order in ORDERS, "order", f"be one of {', '.join(ORDERS)}", order)
    grid = _distance(frames, height, width, device)
    name = f"near_to_far_{prefix}_{frames}x{height}x{width}"
    if order == "shells":
        grid, name = grid.sort().values, f"{name}_shells"
    # One rank for all: a prefix token's is its index, a grid token's comes after the whole prefix.
    shell = torch.cat([torch.arange(prefix, dtype=torch.int32, device=device), grid + prefix])
    return by_rank(name, (shell, shell))


def near_to_far_order(frames: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The grid's raster indices in the order in which shells generate them.

    Args:
        frames: Grid extent in time; 1 for an image.
        height: Grid rows.
        width: Grid columns.
        device: Where the order lives; None: the default.

    Returns:
        int64 ``(frames * height * width,)``: ``tokens[:, order]`` lies in shell order, and
        ``shells[:, order.argsort()]`` in raster order again. Within a shell, raster order.

    Raises:
        ConfigError: If an extent is not an int of at least 1.

    Source: NAR, arXiv 2503.10696, the order of generation.
    """
    return _distance(frames, height, width, device).sort(stable=True).indices


def _distance(frames: int, height: int, width: int, device: torch.device | str | None) -> Tensor:
    """Manhattan distance of each grid token from the origin, int32, in raster order."""
    for name, extent in (("frames", frames), ("height", height), ("width", width)):
        check_count(name, extent, minimum=1)
    t, h, w = (torch.arange(extent, dtype=torch.int32, device=device) for extent in (frames, height, width))
    return (t[:, None, None] + h[:, None] + w).flatten()

"""Next-neighbour attention: a token grid is generated shell by shell, from near to far."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.masks._checks import check_count
from omnisparse_flex.types import MaskMod


def near_to_far(prefix: int, frames: int, height: int, width: int, device: torch.device | str | None = None) -> MaskMod:
    """A grid token sees the condition prefix and every token no farther from the grid's origin than itself.

    Tokens are the prefix, then the grid in raster order (frames, rows, columns). Distance
    is ``t + h + w``, so a Manhattan shell sees itself and every nearer shell, and is
    generated in one pass: ``frames + height + width - 2`` passes for a grid.

    Args:
        prefix: Condition tokens before the grid; 0 for none.
        frames: Grid extent in time; 1 for an image.
        height: Grid rows.
        width: Grid columns.
        device: Where the captured table lives, the queries' device; None: the default.

    Returns:
        A ``mask_mod`` over ``prefix + frames * height * width`` queries and keys.

    Raises:
        ConfigError: If ``prefix`` is not an int of at least 0, or an extent not one of at
            least 1.

    Source: NAR, arXiv 2503.10696, near-to-far next-neighbour prediction. Our
    choice: the prefix is causal inside itself and does not see the grid.
    """
    check_count("prefix", prefix, minimum=0)
    check_count("frames", frames, minimum=1)
    check_count("height", height, minimum=1)
    check_count("width", width, minimum=1)
    t, h, w = (torch.arange(extent, dtype=torch.int32, device=device) for extent in (frames, height, width))
    grid = (t[:, None, None] + h[:, None] + w).flatten()
    # One rank for all: a prefix token's is its index, a grid token's comes after the whole prefix.
    shell = torch.cat([torch.arange(prefix, dtype=torch.int32, device=device), grid + prefix])

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return shell[kv_idx] <= shell[q_idx]

    mask_mod.__name__ = f"near_to_far_{prefix}_{frames}x{height}x{width}"
    return mask_mod

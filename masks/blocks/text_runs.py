"""Which text keys are always kept: the prompt's head and tail and long runs, not the short ones between frames."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.expr.block_bounds import Grid, any_in_blocks

#: Tokens from which on a run of text is always kept. Our choice: what fills a block of keys. A timestamp or "Frame 7:"
#: takes about ten, and one for every frame would keep nearly every block (SELECTION, section 8).
LONG_RUN = 128


class TextBlocks(NamedTuple):
    """What text is always kept.

    Attributes:
        keys: bool (B or 1, 1, NQ or 1, NK), key blocks that each query block keeps for their text.
        rows: bool (B or 1, 1, NQ), query blocks that hold a query of such text.
    """

    keys: Tensor
    rows: Tensor


def text_blocks(visual: Tensor | None, grid: Grid, own: Tensor) -> TextBlocks:
    """The key blocks that hold text which a query block always keeps.

    A run of text is a maximal run of tokens that are not visual. Query i keeps the text keys of a run that is the
    head of the row (nothing visual before it), its tail (nothing visual after it), at least ``LONG_RUN`` tokens long,
    or that holds i itself. Other runs are chosen or not, as visual keys are.

    Args:
        visual: bool (B, S), or None: nothing is known, and every token is eligible. Tokens past its end, as those
            that a static cache has room for, count as text.
        grid: The site's blocks.
        own: int64 (L,), the key position of each query.

    Returns:
        The text's blocks. Query blocks before whose end nothing is visual see a prompt of text: none of it is kept.

    Our choice, all of it; the paper keeps every text key. Under causality the answer depends on no token after the
    query block: the tail and an unfinished run are then seen by their own queries alone, which keep them anyway. So
    prefill in chunks keeps what whole prefill keeps. Padding counts as text (the mask hides it), and in a packed row
    the tail of one prompt and the head of the next are one run.
    """
    if visual is None:
        nothing = torch.zeros((1, 1, 1), dtype=torch.bool, device=grid.device)
        return TextBlocks(nothing.unsqueeze(-1), nothing)
    # In numbers: Inductor's C++ code for padded bools does not compile where they are reduced.
    text = 1 - F.pad(visual.to(torch.int32), (0, grid.kv_len - visual.shape[1]))
    before = F.pad(text.cumsum(-1, dtype=torch.int32), (1, 0))  # (B, S + 1), text tokens before each position
    kept = _kept_by_later(text > 0, before, grid)
    first, last = (_of_blocks(grid, own, end=end) for end in (False, True))
    seen = last + 1 > before.index_select(1, last + 1)  # something visual is there by the block's last query
    blocks = any_in_blocks(kept, 1, grid.kv_blocks, grid.kv_block).unsqueeze(1) | _own_run(before, grid, first)
    rows = any_in_blocks(kept.index_select(1, own), 1, grid.q_blocks, grid.block)
    return TextBlocks((seen.unsqueeze(-1) & blocks).unsqueeze(1), (seen & rows).unsqueeze(1))


def _kept_by_later(text: Tensor, before: Tensor, grid: Grid) -> Tensor:
    """Text tokens of the head, the tail and long runs; bool (B, S)."""
    places = torch.arange(grid.kv_len, device=grid.device)
    shown = places + 1 - before[:, 1:]  # visual tokens up to each position
    ends = shown == shown[:, -1:]
    # A run is long where LONG_RUN tokens from some start on are text, and its tokens are those within LONG_RUN of one.
    starts = before.index_select(1, _inside(places + LONG_RUN, grid.kv_len)) - before[:, :-1] == LONG_RUN
    number = F.pad(starts.cumsum(-1, dtype=torch.int32), (1, 0))
    long = number[:, 1:] > number.index_select(1, _inside(places + 1 - LONG_RUN, grid.kv_len))
    return text & ((shown == 0) | ends | long)


def _own_run(before: Tensor, grid: Grid, first: Tensor) -> Tensor:
    """Earlier key blocks that the run of a query block's first query reaches back to; bool (B, NQ, NK)."""
    last = (torch.arange(grid.kv_blocks, device=grid.device) + 1) * grid.kv_block - 1  # each key block's
    last = _inside(last, grid.kv_len - 1)
    text = before.index_select(1, first + 1).unsqueeze(-1) - before.index_select(1, last).unsqueeze(1)
    return (last < first.unsqueeze(-1)) & (text == first.unsqueeze(-1) + 1 - last)


def _of_blocks(grid: Grid, own: Tensor, *, end: bool) -> Tensor:
    """Key position of the first query of each block, or of its last one; int64 (NQ,)."""
    starts = torch.arange(grid.q_blocks, device=grid.device) * grid.block
    places = own.index_select(0, _inside(starts + grid.block - 1, grid.q_len - 1) if end else starts)
    # Realized: Inductor cannot bound an index into an index.
    result: Tensor = torch.ops.omnisparse.realize(places)
    return result


def _inside(places: Tensor, last: int) -> Tensor:
    """``places`` in [0, ``last``]; realized: Inductor fails to bound an index that it can follow back to a clamp."""
    inside: Tensor = torch.ops.omnisparse.realize(places.clamp(min=0, max=last))
    return inside

"""Which blocks one site keeps."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.attention import select_op
from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.masks.blocks.select import BlockSelection, change_of_logits, grid_of, select_blocks


def choose(query: Tensor, key: Tensor, site: SparseCall) -> BlockSelection:
    """The blocks that a sparse site keeps, recorded where ``site.write`` asks for it.

    Args:
        query: (B, Hq, L, D), without gradient.
        key: (B, Hkv, S, D), without gradient.
        site: The rest.

    Returns:
        The selection; made by the compiled operator where the site's rules have a name.
    """
    selection = select_op.call_select_op(query, key, site) if site.rules else _inline(query, key, site)
    if site.note is not None and site.config.budget == "peak":
        site.note(selection.recall, selection.layout.some, site.target)
    if site.write is not None:
        site.write(site.stats_of(selection, query, key))
    return selection


def _inline(query: Tensor, key: Tensor, site: SparseCall) -> BlockSelection:
    grid = grid_of(query, key, site.config.split)
    return select_blocks(
        query,
        key,
        site.mask,
        site.config,
        target=site.target,
        scale=site.scale_for(query),
        visual=site.visual,
        q_offset=site.q_offset,
        adjust=change_of_logits(grid, site.plain_score) if site.changes_scores else None,
        min_peak=site.peak,
        score=site.plain_score if site.changes_scores else None,
        layout=site.layout,
    )

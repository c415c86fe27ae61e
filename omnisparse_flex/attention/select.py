"""Which blocks one site keeps: chosen by its own queries and keys, or by another layer's."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from omnisparse_flex.attention import select_op
from omnisparse_flex.attention.call import Site
from omnisparse_flex.masks.blocks.select import BlockSelection, at_centres, grid_of, select_blocks


def choose(query: Tensor, key: Tensor, site: Site) -> BlockSelection:
    """The blocks that a sparse site keeps, recorded where ``site.write`` asks for it.

    Args:
        query: (B, Hq, L, D), without gradient.
        key: (B, Hkv, S, D), without gradient.
        site: The rest.

    Returns:
        ``site.choice`` if there is one: another layer's, head by head. Otherwise the site's own. The record
        of a site with another's choice has that layer's budgets and queries; the estimate of recall is of the
        site's own queries and keys under the blocks it was given, and its selection cost nothing.

    Source: Kascade (arXiv 2512.16391) for choices that layers share. Our choice: a head takes that of the head
    with its own number.
    """
    if site.choice is None:
        selection = _own(query, key, site)
    elif site.write is None:
        return site.choice
    else:
        mass = _own(query, key, site).mass
        selection = dataclasses.replace(site.choice, mass=mass, recall=(mass * site.choice.keep).sum(-1))
    if site.write is not None:
        site.write(site.measured(selection, query, key))
    return selection


def _own(query: Tensor, key: Tensor, site: Site) -> BlockSelection:
    if site.rules:
        return select_op.call_select_op(query, key, site)
    assert site.config is not None
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
        adjust=at_centres(grid, site.plain_score) if site.changes_scores else None,
        min_peak=site.min_peak,
        score=site.plain_score if site.changes_scores else None,
        layout=site.layout,
    )

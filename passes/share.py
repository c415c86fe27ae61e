"""Which sites use another layer's choice of blocks (``share_layers``): a plan that ``lower`` follows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch.fx import Node

from omnisparse_flex.passes.nodes import shape_of
from omnisparse_flex.passes.state import Rewrite, Site


def share(rewrite: Rewrite) -> None:
    """Set ``lead`` of the sites that use another's choice, and ``alone`` where one had to start a group early.

    Groups are runs of up to ``share_layers`` sparse sites in the order in which they run, whether their graph is
    the same or not: which layers are checkpointed must not change what is selected. The choice is of block maps: a
    site that differs from its lead in mask, lengths or heads cannot read them.
    """
    config = rewrite.settings.config
    sparse = [site for site in rewrite.open_sites() if not config.is_dense(site.layer)]
    if config.share_layers == 1 or len(sparse) < 2:
        return
    sparse.sort(key=place)
    lead, size = sparse[0], 1
    for site in sparse[1:]:
        if size < config.share_layers:
            if layout_key(site) == layout_key(lead):
                site.lead, size = lead, size + 1
                continue
            site.alone = "another mask, length or number of heads than the layer before"
        lead, size = site, 1


def layout_key(site: Site) -> Hashable:
    """What a site's block maps depend on beside its queries and keys; sites of one key may share a choice.

    Those of one graph share a layout too.
    """
    shapes = str((shape_of(site.query)[:3], shape_of(site.key)[:3]))
    return site.expr, site.offset, tuple(leaf.node for leaf in site.leaves), shapes


def notes(sites: Iterable[Site]) -> list[str]:
    """Lines for the report: who uses whose choice, and who could not."""
    follow: dict[int, list[str]] = {}
    alone: dict[str, list[str]] = {}
    for site in sites:
        if site.lead is not None:
            follow.setdefault(site.lead.layer, []).append(str(site.layer))
        elif site.alone:
            alone.setdefault(site.alone, []).append(str(site.layer))
    return [
        *(f"share_layers: layers {', '.join(own)} use the blocks that layer {i} chooses" for i, own in follow.items()),
        *(f"share_layers: layers {', '.join(own)} choose for themselves: {why}" for why, own in alone.items()),
    ]


def place(site: Site) -> tuple[Node, ...]:
    """When a site runs: the calls that lead to it, outermost first. Nodes of one graph compare by their order."""
    nodes, scope = [site.node], site.scope
    while scope.parent is not None and scope.call is not None:
        nodes, scope = [scope.call, *nodes], scope.parent
    return tuple(nodes)

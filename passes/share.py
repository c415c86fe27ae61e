"""Which sites use another layer's choice of blocks (``share_layers``): a plan that ``lower`` follows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch.fx import Node

from omnisparse_flex.passes.rewrite import Rewrite, Site, shape_of


def share(rewrite: Rewrite) -> None:
    """Set ``lead`` of the sites that use another's choice, and ``alone`` where one had to start a group early.

    Groups are runs of up to ``share_layers`` sparse sites in the order in which they run. The choice is of
    block maps: a site that differs from its lead in mask, lengths or heads cannot read them, nor can one in
    another graph.
    """
    config = rewrite.settings.config
    sparse = [site for site in rewrite.open_sites() if config.recall_of(site.layer) < 1.0]
    if config.share_layers == 1 or len(sparse) < 2:
        return
    sparse.sort(key=_place)
    lead, size = sparse[0], 1
    for site in sparse[1:]:
        if size < config.share_layers:
            site.alone = _obstacle(site, lead)
            if not site.alone:
                site.lead, size = lead, size + 1
                continue
        lead, size = site, 1


def layout_key(site: Site) -> Hashable:
    """What a site's block maps depend on beside its tensors; sites of one key may share a layout, and a choice."""
    shapes = str((shape_of(site.query)[:3], shape_of(site.key)[:3]))
    return site.scope, site.expr, site.offset, tuple(site.leaves), shapes


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


def _place(site: Site) -> tuple[Node, ...]:
    """Calls that lead to a site, outermost first: nodes of one graph compare by their order."""
    nodes, scope = [site.node], site.scope
    while scope.parent is not None and scope.call is not None:
        nodes, scope = [scope.call, *nodes], scope.parent
    return tuple(nodes)


def _obstacle(site: Site, lead: Site) -> str:
    if site.scope is not lead.scope:
        return "no graph is shared with the layer before (activation checkpointing)"
    return (
        "" if layout_key(site) == layout_key(lead) else "another mask, length or number of heads than the layer before"
    )

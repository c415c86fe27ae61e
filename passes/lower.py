"""Pass 5: write one sparse-attention call in place of each site that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from torch.fx import Node

from omnisparse_flex.attention.call import Site as AttentionSite
from omnisparse_flex.attention.call import register
from omnisparse_flex.attention.flex_options import Options, kernel_options
from omnisparse_flex.attention.functional import autocast_dtype
from omnisparse_flex.attention.select_op import PARTS, empty_parts
from omnisparse_flex.masks.expr.program import MaskProgram
from omnisparse_flex.passes.nodes import value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.share import layout_key, place, share
from omnisparse_flex.passes.site_functions import (
    Constants,
    choice_function,
    given_function,
    layer_function,
    layout_function,
    listed_function,
    part_function,
)
from omnisparse_flex.passes.state import Leaf, Rewrite, Settings, Site
from omnisparse_flex.passes.writes import mutations


@dataclasses.dataclass(eq=False, slots=True)
class _Shared:
    """Nodes that several sites read, by graph: one layout for each mask and lengths, one choice for each lead.

    Attributes:
        leads: Sites whose choice others use.
        whole: Leads of whose choice all is wanted, though they have no record; see ``_whole``.
        layouts: By graph and ``layout_key``.
        choices: By graph and lead.
        parts: Single tensors of a lead's choice in its own graph, by lead and name.
    """

    leads: set[Site | None]
    whole: set[Site]
    layouts: dict[Hashable, Node] = dataclasses.field(default_factory=dict)
    choices: dict[tuple[Scope, Site], Node] = dataclasses.field(default_factory=dict)
    parts: dict[tuple[Site, str], Node] = dataclasses.field(default_factory=dict)


def lower(rewrite: Rewrite) -> None:
    """Replace every open site by a call of its own named function.

    The function holds what is constant (rules, expressions) and takes what is not (tensors)
    as graph operands, so that the graph stays honest about what it reads.
    """
    share(rewrite)
    shared = _Shared({site.lead for site in rewrite.sites}, _whole(rewrite))
    sites = rewrite.open_sites()
    if any(site.lead for site in sites):
        sites.sort(key=place)  # a lead's graph may come after its follower's
    for site in rewrite.visit(sites):
        constants = _constants(site, rewrite.settings)
        operands = _operands(site, rewrite, constants, shared)
        with site.scope.graph_module.graph.inserting_before(site.node):
            call = site.scope.graph_module.graph.call_function(layer_function(site, constants), operands)
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        rewrite.moved(site.node, call)
        rewrite.orphans.append(Leaf(site.node, site.scope))
        site.node = call
        site.rewritten = rewrite.modified = True


def _whole(rewrite: Rewrite) -> set[Site]:
    """Leads without a record of which a follower's record tells: they are in bodies, the followers are not."""
    outside = (site.lead for site in rewrite.sites if site.scope.parent is None and rewrite.state[2] is not None)
    return {lead for lead in outside if lead is not None and lead.scope.parent is not None}


def _operands(site: Site, rewrite: Rewrite, constants: Constants, shared: _Shared) -> tuple[Node | None, ...]:
    """(query, key, value, sinks, layout, visual, recall, stats, maps, recalls, *mask, *bias, *score operands).

    Where layers share a choice of blocks, it stands in place of the layout; its lead leaves target and records to it.
    """
    state = tuple(None if node is None else site.scope.carry(node, rewrite.root) for node in _state_for(site, rewrite))
    leaves = [_leaf_operand(leaf, site.scope) for leaf in (*site.leaves, *site.bias_leaves)]
    scores = site.mods[2] if site.mods is not None else ()
    if site.lead is not None:
        given: Node | None = _choice_node(site, site.lead, rewrite.settings, state[0], shared)
    else:
        given = _layout_node(site, rewrite.settings, state[0], shared.layouts)
    if site in shared.leads:
        function = choice_function(site, constants, whole=site in shared.whole)
        graph = site.scope.graph_module.graph
        with graph.inserting_before(site.node):
            given = graph.call_function(function, (site.query, site.key, given, *state, *leaves, *scores))
        shared.choices[site.scope, site], state = given, (None,) * len(state)
    return (site.query, site.key, site.value, site.sinks, given, *state, *leaves, *scores)


def _choice_node(site: Site, lead: Site, settings: Settings, visual: Node | None, shared: _Shared) -> Node:
    """The lead's choice; where it was made in another graph, put together again from what came out of that one.

    The layout is made anew: it is cheap, and would have to be kept for the backward as long as the choice is.
    """
    if (site.scope, lead) not in shared.choices:
        layout, wanted = _layout_node(site, settings, visual, shared.layouts), [name for name, *_ in PARTS]
        names = tuple(wanted if site.scope.parent is None and lead in shared.whole else wanted[:1])
        parts = [site.scope.reach(_part_node(lead, name, shared), lead.scope) for name in names]
        graph = site.scope.graph_module.graph
        with graph.inserting_before(site.node):
            shared.choices[site.scope, lead] = graph.call_function(given_function(names), (layout, *parts))
    return shared.choices[site.scope, lead]


def _part_node(lead: Site, name: str, shared: _Shared) -> Node:
    """One tensor of a choice, in the graph where it was made."""
    if (lead, name) not in shared.parts:
        choice, graph = shared.choices[lead.scope, lead], lead.scope.graph_module.graph
        with graph.inserting_after(choice):
            node = graph.create_node("call_function", part_function(name), (choice,), name=f"{name}_{lead.layer}")
        values = empty_parts(value_of(lead.query), value_of(lead.key), len(PARTS))
        node.meta["example_value"] = dict(zip((name for name, *_ in PARTS), values, strict=True))[name]
        shared.parts[lead, name] = node
    return shared.parts[lead, name]


def _layout_node(site: Site, settings: Settings, visual: Node | None, layouts: dict[Hashable, Node]) -> Node | None:
    """One node for all layers with this mask and these lengths: there are far fewer masks than layers."""
    if settings.config.recall_of(site.layer) == 1.0:
        return None
    what = site.scope, layout_key(site)
    if what not in layouts:
        leaves = [_leaf_operand(leaf, site.scope) for leaf in site.leaves]
        graph, function = site.scope.graph_module.graph, layout_function(site, settings.config)
        with graph.inserting_before(site.node):
            layouts[what] = graph.call_function(function, (site.query, site.key, visual, *leaves))
    return layouts[what]


def _state_for(site: Site, rewrite: Rewrite) -> tuple[Node | None, ...]:
    visual, recall, *records = rewrite.state
    # A checkpointed body must not write to its inputs.
    return (visual, recall, *(records if site.scope.parent is None else [None] * len(records)))


def _leaf_operand(leaf: Leaf, scope: Scope) -> Node | None:
    if leaf.node is None:
        return None
    if leaf not in leaf.home.made:
        leaf.home.made[leaf] = _made(leaf)
    return scope.carry(leaf.home.made[leaf], leaf.home)


def _made(leaf: Leaf) -> Node:
    """A leaf's value as the mask saw it: static caches advance their length tensor afterwards."""
    node, graph = leaf.node, leaf.home.graph_module.graph
    assert node is not None
    if leaf.listed is not None:
        made_of = (node, leaf.listed.indices, leaf.listed.kv_len)
        with graph.inserting_after(max(x for x in made_of if isinstance(x, Node))):
            return graph.call_function(listed_function(leaf.listed.block), made_of)
    if mutations(node):
        with graph.inserting_before(min(node.users)):
            copy = graph.call_method("clone", (node,))
        copy.meta = dict(node.meta)
        node = copy
    if not leaf.detached:
        return node
    with graph.inserting_after(node):
        without = graph.call_method("detach", (node,))
    # A copy: the flex operator takes a tensor and its alias for one, and gives neither a gradient.
    with graph.inserting_after(without):
        copy = graph.call_method("clone", (without,))
    for made in (without, copy):
        made.meta = {**node.meta, "example_value": value_of(node).detach()}
    return copy


def _constants(site: Site, settings: Settings) -> Constants:
    """What is constant about a site, for the functions that are written in its place."""
    config = settings.config
    dense = config.recall_of(site.layer) == 1.0
    options, site.flash_refused = _kernel_options(site, settings, dense)
    fixed: dict[str, Any] = {
        "config": None if dense else config,
        "score_mod": site.mods[0] if site.mods is not None else None,
        "softcap": site.softcap,
        "bias": site.bias,
        "scale": site.scale,
        "lists": settings.lists,
        "static": settings.static,
        "kernel_options": options,
    }
    plain = site.mods is None and site.bias is None and site.softcap == 0
    if not dense and (config.granularity == "token" or (settings.lists and plain)):
        fixed["rules"] = register(AttentionSite(mask=MaskProgram(site.expr), **fixed))
    target, counts = config.recall_of(site.layer), (len(site.leaves), len(site.bias_leaves))
    return Constants(site.layer, target, site.expr, site.offset, *counts, fixed)


def _kernel_options(site: Site, settings: Settings, dense: bool) -> tuple[Options, str]:
    if not settings.lists:
        return (), ""  # no flex kernel is compiled; the report says so
    if settings.config.granularity == "token" and not dense:
        return (), "token granularity" if settings.kernel == "flash" else ""  # its kernels are our own
    query, key, value = (value_of(x) for x in (site.query, site.key, site.value))
    dtype = autocast_dtype(query.device.type) or query.dtype
    plain = site.mods is None and site.bias is None and site.softcap == 0
    facts = {"plain_scores": plain, "captures": len(site.leaves) > 0, "sinks": site.sinks is not None}
    return kernel_options(settings.kernel, query, key, value, dtype, **facts)

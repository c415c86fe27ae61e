"""Pass 5: write one sparse-attention call in place of each site that is left.

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=lt(sub(q, kv), window)

After::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    layout = omnisparse_layout(q, k, window)
    sparse = omnisparse_layer_0(q, k, v, layout, window)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return sparse
    # site sparse: query=q, key=k, value=v, mask=lt(sub(q, kv), window), rewritten
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.fx import Node

from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.flex_options import Options, kernel_options
from omnisparse_flex.attention.functional import autocast_dtype
from omnisparse_flex.masks.expr.program import MaskProgram
from omnisparse_flex.passes.nodes import shape_of, value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.site_functions import (
    Constants,
    layer_function,
    layout_function,
    listed_function,
)
from omnisparse_flex.passes.state import Leaf, Rewrite, Settings, Site
from omnisparse_flex.passes.writes import mutations


def lower(rewrite: Rewrite) -> None:
    """Replace every open site by a call of its own named function.

    The function holds what is constant (rules, expressions) and takes what is not (tensors)
    as graph operands, so that the graph stays honest about what it reads.
    """
    layouts: dict[Hashable, Node] = {}
    for site in rewrite.visit(rewrite.open_sites()):
        constants = _constants(site, rewrite.settings)
        operands = _operands(site, rewrite, layouts)
        with site.scope.graph_module.graph.inserting_before(site.node):
            call = site.scope.graph_module.graph.call_function(layer_function(site, constants), operands)
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        rewrite.moved(site.node, call)
        rewrite.orphans.append(Leaf(site.node, site.scope))
        site.node = call
        site.rewritten = rewrite.modified = True


def _operands(site: Site, rewrite: Rewrite, layouts: dict[Hashable, Node]) -> tuple[Node | None, ...]:
    """(query, key, value, sinks, layout, *state, *mask, *bias, *score operands); see ``_state_operands``."""
    state = _state_operands(site)
    leaves = [_leaf_operand(leaf, site.scope) for leaf in (*site.leaves, *site.bias_leaves)]
    scores = site.mods[2] if site.mods is not None else ()
    layout = _layout_node(site, rewrite.settings, state[0], layouts)
    return (site.query, site.key, site.value, site.sinks, layout, *state, *leaves, *scores)


def _layout_node(site: Site, settings: Settings, visual: Node | None, layouts: dict[Hashable, Node]) -> Node | None:
    """One node for all layers with this mask and these lengths: there are far fewer masks than layers."""
    if settings.config.is_dense(site.layer):
        return None
    what = site.scope, _layout_key(site), visual
    if what not in layouts:
        leaves = [_leaf_operand(leaf, site.scope) for leaf in site.leaves]
        graph, function = site.scope.graph_module.graph, layout_function(site, settings.config)
        with graph.inserting_before(site.node):
            layouts[what] = graph.call_function(function, (site.query, site.key, visual, *leaves))
    return layouts[what]


def _layout_key(site: Site) -> Hashable:
    """What a site's block layout depends on beside its queries and keys; sites of one key share one layout."""
    shapes = str((shape_of(site.query)[:3], shape_of(site.key)[:3]))
    return site.expr, site.offset, tuple(leaf.node for leaf in site.leaves), shapes


def _state_operands(site: Site) -> tuple[Node | None, ...]:
    """(visual, recall, stats, maps, recalls, promises) in the site's graph; a checkpointed body writes to no input."""
    visual, recall, *records = site.state or (None,) * 6
    kept = (visual, recall, *(records if site.scope.parent is None else [None] * len(records)))
    return tuple(None if leaf is None else site.scope.carry(_node(leaf), leaf.home) for leaf in kept)


def _leaf_operand(leaf: Leaf, scope: Scope) -> Node | None:
    if leaf.node is None:
        return None
    if leaf not in leaf.home.made:
        leaf.home.made[leaf] = _made(leaf)
    return scope.carry(leaf.home.made[leaf], leaf.home)


def _node(leaf: Leaf) -> Node:
    assert leaf.node is not None
    return leaf.node


def _made(leaf: Leaf) -> Node:
    """A leaf's value as the mask saw it: static caches advance their length tensor afterwards."""
    node, graph = _node(leaf), leaf.home.graph_module.graph
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
    dense = config.is_dense(site.layer)
    options, site.flash_refused = _kernel_options(site, settings, dense)
    fixed: dict[str, Any] = {
        "score_mod": site.mods[0] if site.mods is not None else None,
        "softcap": site.softcap,
        "bias": site.bias,
        "scale": site.scale,
        "lists": settings.lists,
        "kernel_options": options,
    }
    if not dense:
        fixed |= {"config": config, "static": settings.static}
    plain = site.mods is None and site.bias is None and site.softcap == 0
    if not dense and (config.granularity == "token" or (settings.lists and plain)):
        fixed["rules"] = register(SparseCall(mask=MaskProgram(site.expr), **fixed))
    target, peak = config.recall_of(site.layer), config.min_peak_of(site.layer)
    counts = len(site.leaves), len(site.bias_leaves)
    return Constants(site.layer, target, peak, site.expr, site.offset, *counts, fixed)


def _kernel_options(site: Site, settings: Settings, dense: bool) -> tuple[Options, str]:
    if not settings.lists:
        return (), ""  # no flex kernel is compiled; the report says so
    if settings.config.granularity == "token" and not dense:
        return (), "token granularity" if settings.kernel == "flash" else ""  # its kernels are our own
    query, key, value = (value_of(x) for x in (site.query, site.key, site.value))
    dtype = autocast_dtype(query.device.type) or query.dtype
    plain = site.mods is None and site.bias is None and site.softcap == 0
    narrow = settings.config.split > 1 and not dense
    reads = len(site.leaves) > 0 or (narrow and settings.training)  # then the mask reads the map, see ``attend``
    facts = {"plain_scores": plain, "captures": reads, "sinks": site.sinks is not None, "narrow": narrow}
    return kernel_options(settings.kernel, query, key, value, dtype, **facts)

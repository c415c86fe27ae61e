"""Pass 5: write one sparse-attention call in place of each site that is left."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from omnisparse_flex.attention import attend, autocast_dtype, scalar
from omnisparse_flex.cacheable import importable
from omnisparse_flex.kernel_choice import Options, kernel_options
from omnisparse_flex.masks.expr import Const, Expr, Load
from omnisparse_flex.masks.layout import Layout, block_layout
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.record import Measured
from omnisparse_flex.masks.select import grid_of
from omnisparse_flex.passes.rewrite import Leaf, Rewrite, Scope, Settings, Site, mutations, shape_of, value_of
from omnisparse_flex.site import Site as AttentionSite
from omnisparse_flex.site import register


def lower(rewrite: Rewrite) -> None:
    """Replace every open site by a call of its own named function.

    The function holds what is constant (rules, expressions) and takes what is not (tensors)
    as graph operands, so that the graph stays honest about what it reads.
    """
    layouts: dict[Hashable, Node] = {}
    for site in rewrite.open_sites():
        operands = _operands(site, rewrite, layouts)
        with site.scope.graph_module.graph.inserting_before(site.node):
            call = site.scope.graph_module.graph.call_function(_function(site, rewrite.settings), operands)
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        rewrite.moved(site.node, call)
        rewrite.orphans.append(Leaf(site.node, site.scope))
        site.node = call
        site.rewritten = rewrite.modified = True


def _operands(site: Site, rewrite: Rewrite, layouts: dict[Hashable, Node]) -> tuple[Node | None, ...]:
    """(query, key, value, sinks, layout, visual, recall, stats, maps, recalls, *mask, *bias, *score operands)."""
    state = tuple(None if node is None else site.scope.carry(node, rewrite.root) for node in _state_for(site, rewrite))
    leaves = [_leaf_operand(leaf, site.scope) for leaf in (*site.leaves, *site.bias_leaves)]
    scores = site.mods[2] if site.mods is not None else ()
    layout = _layout_node(site, rewrite.settings, state[0], layouts)
    return (site.query, site.key, site.value, site.sinks, layout, *state, *leaves, *scores)


def _layout_node(site: Site, settings: Settings, visual: Node | None, layouts: dict[Hashable, Node]) -> Node | None:
    """One node for all layers with this mask and these lengths: there are far fewer masks than layers."""
    if settings.config.recall_of(site.layer) == 1.0:
        return None
    shapes = str((shape_of(site.query)[:3], shape_of(site.key)[:3]))
    what = (site.scope, site.expr, site.offset, tuple(site.leaves), shapes)
    if what not in layouts:
        leaves = [_leaf_operand(leaf, site.scope) for leaf in site.leaves]
        graph = site.scope.graph_module.graph
        with graph.inserting_before(site.node):
            layouts[what] = graph.call_function(
                _layout_function(site, settings), (site.query, site.key, visual, *leaves)
            )
    return layouts[what]


def _state_for(site: Site, rewrite: Rewrite) -> tuple[Node | None, ...]:
    visual, recall, *records = rewrite.state
    # A checkpointed body must not write to its inputs.
    return (visual, recall, *(records if site.scope.parent is None else [None] * len(records)))


def _leaf_operand(leaf: Leaf, scope: Scope) -> Node | None:
    if leaf.node is None:
        return None
    return scope.carry(_before_mutation(leaf), leaf.home)


def _before_mutation(leaf: Leaf) -> Node:
    """A leaf's value as the mask saw it: static caches advance their length tensor afterwards."""
    node = leaf.node
    assert node is not None
    if not mutations(node):
        return node
    first_reader = min(node.users)
    with leaf.home.graph_module.graph.inserting_before(first_reader):
        copy = leaf.home.graph_module.graph.call_method("clone", (node,))
    copy.meta = dict(node.meta)
    return copy


def _layout_function(site: Site, settings: Settings) -> Callable[..., Layout]:
    """A named function with the mask's constants in its closure."""
    expr, offset, config = site.expr, site.offset, settings.config

    def call(query: Tensor, key: Tensor, visual: Tensor | None, *leaves: Any) -> Layout:
        mask, q_offset = _mask(expr, offset, query, key, leaves)
        visual = None if visual is None else visual.to(query.device)
        grid = grid_of(query, key)
        return block_layout(mask, grid, int(key.shape[1]), config, visual=visual, q_offset=q_offset)

    return importable(_renamed(call, "omnisparse_layout"), None)


def _function(site: Site, settings: Settings) -> Callable[..., Tensor]:
    """A named function with the site's constants in its closure (FX needs a name to call)."""
    count, scores = len(site.leaves), len(site.leaves) + len(site.bias_leaves)
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
    expr, offset, layer, target = site.expr, site.offset, site.layer, config.recall_of(site.layer)
    plain = site.mods is None and site.bias is None and site.softcap == 0
    if not dense and (config.granularity == "token" or (settings.lists and plain)):
        fixed["rules"] = register(AttentionSite(mask=MaskProgram(expr), **fixed))

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: Layout | None,
        visual: Tensor | None,
        recall: Tensor | None,
        stats: Tensor | None,
        maps: Tensor | None,
        recalls: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        mask, q_offset = _mask(expr, offset, query, key, rest[:count])
        attention = AttentionSite(
            mask=mask,
            bias_buffers=_as_tensors(rest[count:scores], query, key),
            score_buffers=rest[scores:],
            target=target if recall is None else _recall_of(recall, layer, query.device),
            visual=None if visual is None else visual.to(query.device),
            q_offset=q_offset,
            sinks=sinks,
            layout=layout,
            write=None if stats is None else _writer(layer, stats, maps, recalls),
            exact=recalls is not None,
            **fixed,
        )
        return attend(query, key, value, attention)

    function = _renamed(call, f"omnisparse_layer_{layer}")
    if site.mods is not None:
        return function  # it closes over a score graph, which has no name: AOTAutograd does not cache such a graph
    return importable(function, autocast_dtype(value_of(site.query).device.type))


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


def _renamed(function: Callable[..., Any], name: str) -> types.FunctionType:
    """A copy under another name, for FX to print."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


def _recall_of(recall: Tensor, layer: int, device: torch.device) -> Tensor:
    """One layer's target, realized: kernels of all layers then read the same place and share their code."""
    target: Tensor = torch.ops.omnisparse.realize(recall[layer].to(device))
    return target


def _writer(layer: int, stats: Tensor, maps: Tensor | None, recalls: Tensor | None) -> Callable[[Measured], None]:
    """Writes one site's record into the rows of its layer; a picture is cropped to fit."""

    def write(measured: Measured) -> None:
        stats[layer].copy_(measured.stats)
        if maps is not None:
            canvas, cells = maps[layer], measured.cells
            heads, rows, columns = (min(a, b) for a, b in zip(canvas.shape, cells.shape, strict=True))
            canvas[:heads, :rows, :columns].copy_(cells[:heads, :rows, :columns])
        if recalls is not None:
            recalls[layer].copy_(measured.recalls)

    return write


def _mask(
    expr: Expr, offset: Expr | None, query: Tensor, key: Tensor, leaves: Sequence[Any]
) -> tuple[MaskProgram, Tensor | int]:
    """The lifted mask over its leaves, and the position of query 0."""
    buffers = _as_tensors(leaves, query, key)
    if isinstance(offset, Const):
        return MaskProgram(expr, buffers), int(offset.value)
    assert isinstance(offset, Load) and not offset.at, f"offset {offset} is not a number or a scalar"
    return MaskProgram(expr, buffers), buffers[offset.slot]


def _as_tensors(leaves: Sequence[Any], query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Leaves as tensors; None stands for S - L."""
    values = (key.shape[2] - query.shape[2] if x is None else x for x in leaves)
    return tuple(x if isinstance(x, Tensor) else scalar(x, query.device) for x in values)

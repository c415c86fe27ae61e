"""Pass 5: write one sparse-attention call in place of each site that is left."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from omnisparse_flex.attention import Site as AttentionSite
from omnisparse_flex.attention import attend, autocast_dtype, scalar
from omnisparse_flex.masks.expr import Const, Load
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.record import record_maps, selection_stats, true_recall
from omnisparse_flex.masks.select import BlockSelection
from omnisparse_flex.passes.cacheable import importable
from omnisparse_flex.passes.rewrite import Leaf, Rewrite, Scope, Settings, Site, mutations, value_of


def lower(rewrite: Rewrite) -> None:
    """Replace every open site by a call of its own named function.

    The function holds what is constant (rules, expressions) and takes what is not (tensors)
    as graph operands, so that the graph stays honest about what it reads.
    """
    for site in rewrite.open_sites():
        operands = _operands(site, rewrite)
        with site.scope.graph_module.graph.inserting_before(site.node):
            call = site.scope.graph_module.graph.call_function(_function(site, rewrite.settings), operands)
        call.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(call)
        rewrite.orphans.append(Leaf(site.node, site.scope))
        site.node = call
        site.rewritten = rewrite.modified = True


def _operands(site: Site, rewrite: Rewrite) -> tuple[Node | None, ...]:
    """(query, key, value, visual, recall, stats, maps, recalls, *mask leaves, *bias leaves, *score operands)."""
    state = tuple(None if node is None else site.scope.carry(node, rewrite.root) for node in _state_for(site, rewrite))
    leaves = [_leaf_operand(leaf, site.scope) for leaf in (*site.leaves, *site.bias_leaves)]
    scores = site.mods[2] if site.mods is not None else ()
    return (site.query, site.key, site.value, *state, *leaves, *scores)


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


def _function(site: Site, settings: Settings) -> Callable[..., Tensor]:
    """A named function with the site's constants in its closure (FX needs a name to call)."""
    count, bias_count = len(site.leaves), len(site.bias_leaves)
    config = settings.config
    dense = config.recall_of(site.layer) == 1.0
    fixed: dict[str, Any] = {
        "config": None if dense else config,
        "score_mod": site.mods[0] if site.mods is not None else None,
        "softcap": site.softcap,
        "bias": site.bias,
        "scale": site.scale,
        "lists": settings.lists,
        "kernel_options": settings.kernel_options,
    }
    expr, offset, layer, target = site.expr, site.offset, site.layer, config.recall_of(site.layer)

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visual: Tensor | None,
        recall: Tensor | None,
        stats: Tensor | None,
        maps: Tensor | None,
        recalls: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        difference = key.shape[2] - query.shape[2]
        leaves = [_as_tensor(difference if x is None else x, query.device) for x in rest[: count + bias_count]]
        attention = AttentionSite(
            mask=MaskProgram(expr, tuple(leaves[:count])),
            bias_buffers=tuple(leaves[count:]),
            score_buffers=rest[count + bias_count :],
            target=target if recall is None else _recall_of(recall, layer, query.device),
            visual=None if visual is None else visual.to(query.device),
            q_offset=_offset_value(offset, leaves),
            on_select=None if stats is None else _recorder(layer, stats, maps, recalls),
            **fixed,
        )
        return attend(query, key, value, attention)

    name = f"omnisparse_layer_{layer}"
    function = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
    if site.mods is not None:
        return function  # it closes over a score graph, which has no name: AOTAutograd does not cache such a graph
    return importable(function, autocast_dtype(value_of(site.query).device.type))


def _recall_of(recall: Tensor, layer: int, device: torch.device) -> Tensor:
    """One layer's target, realized: kernels of all layers then read the same place and share their code."""
    target: Tensor = torch.ops.omnisparse.realize(recall[layer].to(device))
    return target


def _recorder(layer: int, stats: Tensor, maps: Tensor | None, recalls: Tensor | None) -> Callable[..., None]:
    """Writes one site's statistics into the rows of its layer."""

    def record(selection: BlockSelection, query: Tensor, key: Tensor, scale: float, site: AttentionSite) -> None:
        stats[layer].copy_(selection_stats(selection))
        if maps is not None:
            record_maps(maps[layer], selection)
        if recalls is not None:
            score = site.plain_score if site.changes_scores else None
            recalls[layer].copy_(true_recall(selection, query, key, site.mask, scale, score))

    return record


def _offset_value(offset: object, leaves: list[Tensor]) -> Tensor | int:
    if isinstance(offset, Const):
        return int(offset.value)
    assert isinstance(offset, Load) and not offset.at, f"offset {offset} is not a number or a scalar"
    return leaves[offset.slot]


def _as_tensor(x: Any, device: torch.device) -> Tensor:
    return x if isinstance(x, Tensor) else scalar(x, device)

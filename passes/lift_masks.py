"""Pass 3: every site's mask becomes index functions over small tensors, or a reason why not.

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=mask

After::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=lt(sub(q, kv), window)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from omnisparse_flex.masks.expr.expr import (
    KV,
    TRUE,
    Apply,
    B,
    Const,
    Expr,
    H,
    Load,
    Q,
    axes,
    causal,
    causal_offset,
    conjunction,
)
from omnisparse_flex.masks.expr.forbidden import SCORE, split_additive
from omnisparse_flex.masks.expr.simplify import simplify
from omnisparse_flex.passes.lift import Lifter
from omnisparse_flex.passes.lift_base import LiftError, is_one
from omnisparse_flex.passes.nodes import dtype_of, same_size, shape_of, value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Leaf, Listed, Rewrite, Site

#: What the flex operator's block mask begins with; it ends in the two sides of a block and the mask graph.
_LISTS = ("q_len", "kv_len", "counts", "indices", "full_counts", "full_indices")


def lift_masks(rewrite: Rewrite) -> None:
    """Fill ``expr``, ``bias``, their leaves and ``offset`` of every open site."""
    for site in rewrite.visit(rewrite.open_sites()):
        try:
            _lift_site(site)
        except LiftError as error:
            site.refuse(str(error))


def _lift_site(site: Site) -> None:
    parts: list[Expr] = []
    if site.causal != "none":
        site.offset = Const(0)
        if site.causal == "lower_right":
            site.offset = _length_difference(site)
        parts.append(causal(site.offset))
    if site.padding is not None:
        parts.append(Lifter(site.leaves, reader=site.node).lift(site.padding, site.scope, (B, KV)))
    if site.mask is not None:
        parts.append(_lift_tensor(site, site.mask))
    if site.mods is not None:
        parts += [_lift_mask_graph(site), _lift_score_graph(site)]
    site.expr = simplify(conjunction(*parts))
    if site.offset is None:
        site.offset = causal_offset(site.expr)
    if site.offset is None:
        # No causality to read: without a cache rows and columns are the same tokens.
        site.offset = Const(0) if _same_length(site) else _length_difference(site)


def _lift_tensor(site: Site, mask: Node) -> Expr:
    """A mask tensor broadcastable to (B, Hq, L, S); its additive part goes to ``site.bias``."""
    shape, whole = shape_of(mask), (*shape_of(site.query)[:3], shape_of(site.key)[2])
    if len(shape) > 4 or not all(
        is_one(size) or same_size(size, own) for size, own in zip(shape, whole[4 - len(shape) :], strict=True)
    ):
        raise LiftError(f"mask {mask.name} {shape} does not broadcast to the logits {whole}")
    reader = site.mask_reader or site.node
    at = tuple(
        Const(0) if isinstance(size, int) and size == 1 else axis
        for axis, size in zip((B, H, Q, KV)[4 - len(shape) :], shape, strict=True)
    )
    if value_of(mask).dtype == torch.bool:
        leaves: list[Leaf] = []
        expr = simplify(Lifter(leaves, reader=reader).lift(mask, site.scope, at))
        expr = _adopt(site, expr, leaves)
        return Apply("not", (expr,)) if site.mask_blocks else expr
    leaves = []
    lifted = simplify(Lifter(leaves, reader=reader).lift(mask, site.scope, at))
    allowed, site.bias = split_additive(lifted, [dtype_of(leaf.node) for leaf in leaves])
    site.bias_leaves = leaves if site.bias is not None else []
    return _adopt(site, allowed, leaves)


def _adopt(site: Site, expr: Expr, leaves: list[Leaf]) -> Expr:
    """Move an expression's loads onto the site's own leaf list."""
    if isinstance(expr, Load):
        leaf = leaves[expr.slot]
        if isinstance(value := value_of(leaf.node), torch.Tensor) and value.requires_grad:
            leaf = dataclasses.replace(leaf, detached=True)  # what is allowed has no gradient
        if leaf not in site.leaves:
            site.leaves.append(leaf)
        return Load(site.leaves.index(leaf), tuple(_adopt(site, a, leaves) for a in expr.at))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(_adopt(site, a, leaves) for a in expr.args))
    return expr


def _lift_mask_graph(site: Site) -> Expr:
    """The mask_mod of a flex_attention site, read from its own sub-graph."""
    assert site.mods is not None
    lifted, leaves = _lift_graph(site, site.mods[1], site.mods[3], (B, H, Q, KV))
    expr = _adopt(site, simplify(lifted), leaves)
    if not axes(expr):
        raise LiftError("flex_attention has a block mask without a mask_mod: its lists alone define it")
    return _within_lists(site, expr)


def _within_lists(site: Site, allowed: Expr) -> Expr:
    """The mask that the kernel computes: ``allowed`` inside the blocks that are listed, all of those listed as full.

    The lists are the caller's mask as much as the function is: nobody knows before the run that they say the same.
    """
    lists = dict(zip(_LISTS, site.lists, strict=False))
    block_q, block_k, _ = site.lists[-3:]
    if not isinstance(lists["counts"], Node) or not (isinstance(block_q, int) and isinstance(block_k, int)):
        raise LiftError("flex_attention has a block mask of a form that is not known here")

    def listed(counts: Node, indices: Node) -> Expr:
        leaf = Leaf(counts, site.scope, listed=Listed(indices, lists["kv_len"], block_k))
        site.leaves.append(leaf)
        shape = shape_of(counts)
        at = tuple(Const(0) if is_one(size) else axis for size, axis in zip(shape, (B, H), strict=False))
        rows, columns = (Apply("floor_divide", (x, Const(n))) for x, n in ((Q, block_q), (KV, block_k)))
        return Load(len(site.leaves) - 1, (*at, rows, columns))

    inside = conjunction(listed(lists["counts"], lists["indices"]), allowed)
    if lists["full_counts"] is None:
        return inside
    return Apply("or", (inside, listed(lists["full_counts"], lists["full_indices"])))


def _lift_score_graph(site: Site) -> Expr:
    """What the score_mod of a flex_attention site forbids; nothing where it cannot be read: it is applied anyway."""
    assert site.mods is not None
    try:
        lifted, leaves = _lift_graph(site, site.mods[0], site.mods[2], (SCORE, B, H, Q, KV))
    except LiftError:
        return TRUE
    allowed, _ = split_additive(simplify(lifted), [dtype_of(leaf.node) for leaf in leaves])
    return TRUE if not axes(allowed) else _adopt(site, simplify(allowed), leaves)


def _lift_graph(
    site: Site, graph_module: GraphModule, operands: tuple[Any, ...], coordinates: tuple[Expr, ...]
) -> tuple[Expr, list[Leaf]]:
    """The result of a mod's sub-graph, and what it reads; its first inputs are ``coordinates``."""
    placeholders = graph_module.graph.find_nodes(op="placeholder", sort=True)
    inputs: dict[Node, Expr] = dict(zip(placeholders, coordinates, strict=False))
    own = placeholders[len(coordinates) :]
    outer = {node: Leaf(value, site.scope) for node, value in zip(own, operands, strict=True)}
    leaves: list[Leaf] = []
    (output,) = graph_module.graph.find_nodes(op="output")
    result = output.args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return Lifter(leaves, inputs, outer).lift(result, Scope(graph_module), ()), leaves


def _length_difference(site: Site) -> Expr:
    """S - L as an expression: a number, or a load that the lowered call fills in."""
    q_len, kv_len = shape_of(site.query)[2], shape_of(site.key)[2]
    if _same_length(site):
        return Const(0)
    if isinstance(q_len, int) and isinstance(kv_len, int):
        return Const(kv_len - q_len)
    site.leaves.append(Leaf(None, site.scope))
    return Load(len(site.leaves) - 1, ())


def _same_length(site: Site) -> bool:
    """Whether S and L are the same number or symbol, without adding a guard."""
    q_len, kv_len = shape_of(site.query)[2], shape_of(site.key)[2]
    if isinstance(q_len, int) and isinstance(kv_len, int):
        return q_len == kv_len
    return str(q_len) == str(kv_len)

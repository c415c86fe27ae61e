"""Pass 3: every site's mask becomes index functions over small tensors, or a reason why not."""

from __future__ import annotations

import torch
from torch.fx import Node

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
    is_boolean,
    simplify,
)
from omnisparse_flex.passes.lift import Lifter
from omnisparse_flex.passes.lift_base import LiftError
from omnisparse_flex.passes.nodes import mutations, shape_of, value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Leaf, Rewrite, Site

#: An additive mask value at or under this means "not allowed" (finfo.min of half is -65504).
NEGATIVE = -1e4


def lift_masks(rewrite: Rewrite) -> None:
    """Fill ``expr``, ``bias``, their leaves and ``offset`` of every open site."""
    for site in rewrite.open_sites():
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
        parts.append(_lift_mask_graph(site))
    site.expr = simplify(conjunction(*parts))
    if site.offset is None:
        site.offset = causal_offset(site.expr)
    if site.offset is None:
        # No causality to read: without a cache rows and columns are the same tokens.
        site.offset = Const(0) if _same_length(site) else _length_difference(site)


def _lift_tensor(site: Site, mask: Node) -> Expr:
    """A mask tensor broadcastable to (B, Hq, L, S); its additive part goes to ``site.bias``."""
    shape = shape_of(mask)
    at = tuple(
        Const(0) if isinstance(size, int) and size == 1 else axis
        for axis, size in zip((B, H, Q, KV)[4 - len(shape) :], shape, strict=True)
    )
    if value_of(mask).dtype == torch.bool:
        expr = simplify(Lifter(site.leaves, reader=site.node).lift(mask, site.scope, at))
        return Apply("not", (expr,)) if site.mask_blocks else expr
    leaves: list[Leaf] = []
    allowed, site.bias = split_additive(simplify(Lifter(leaves, reader=site.node).lift(mask, site.scope, at)))
    site.bias_leaves = leaves if site.bias is not None else []
    return _adopt(site, allowed, leaves)


def _adopt(site: Site, expr: Expr, leaves: list[Leaf]) -> Expr:
    """Move an expression's loads onto the site's own leaf list."""
    if isinstance(expr, Load):
        leaf = leaves[expr.slot]
        if leaf not in site.leaves:
            site.leaves.append(leaf)
        return Load(site.leaves.index(leaf), tuple(_adopt(site, a, leaves) for a in expr.at))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(_adopt(site, a, leaves) for a in expr.args))
    return expr


def split_additive(expr: Expr) -> tuple[Expr, Expr | None]:
    """Split an additive mask into what it forbids and what it adds.

    ``where(allowed, x, -inf)`` forbids; sums forbid what any term forbids.

    Returns:
        ``(allowed, bias)``; bias None where nothing is added.
    """
    match expr:
        case Const(value):
            return (Const(False), None) if value <= NEGATIVE else (TRUE, None if value == 0 else expr)
        case Apply("add", (a, b)):
            (allow_a, bias_a), (allow_b, bias_b) = split_additive(a), split_additive(b)
            biases = [x for x in (bias_a, bias_b) if x is not None]
            total = Apply("add", (biases[0], biases[1])) if len(biases) == 2 else biases[0] if biases else None
            return conjunction(allow_a, allow_b), total
        case Apply("where", (condition, Const(value), other)) if value <= NEGATIVE:
            allowed, bias = split_additive(other)
            return conjunction(Apply("not", (condition,)), allowed), bias
        case Apply("where", (condition, other, Const(value))) if value <= NEGATIVE:
            allowed, bias = split_additive(other)
            return conjunction(condition, allowed), bias
        case Apply("mul", (a, Const(value))) if value <= NEGATIVE and (blocked := _indicator(a)) is not None:
            return Apply("not", (blocked,)), None
        case Apply("mul", (Const(value), a)) if value <= NEGATIVE and (blocked := _indicator(a)) is not None:
            return Apply("not", (blocked,)), None
        case Apply("cast_float", (inner,)) if not is_boolean(inner):
            return split_additive(inner)
    return TRUE, expr


def _indicator(expr: Expr) -> Expr | None:
    """The condition of a 0 / 1 valued expression, or None."""
    match expr:
        case Apply("cast_float", (inner,)):
            return inner if is_boolean(inner) else _indicator(inner)
        case Apply("sub", (Const(1 | 1.0), inner)):
            inverse = _indicator(inner)
            return None if inverse is None else Apply("not", (inverse,))
    return expr if is_boolean(expr) and axes(expr) else None


def _lift_mask_graph(site: Site) -> Expr:
    """The mask_mod of a flex_attention site, read from its own sub-graph."""
    assert site.mods is not None
    _, graph_module, _, operands = site.mods
    placeholders = graph_module.graph.find_nodes(op="placeholder", sort=True)
    inputs: dict[Node, Expr] = dict(zip(placeholders, (B, H, Q, KV), strict=False))
    outer = {node: Leaf(value, site.scope) for node, value in zip(placeholders[4:], operands, strict=True)}
    for value in operands:
        if isinstance(value, Node) and any(change < site.node for change in mutations(value)):
            raise LiftError(f"mask {value.name} is changed in place before it is read")
    (output,) = graph_module.graph.find_nodes(op="output")
    result = output.args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    expr = simplify(Lifter(site.leaves, inputs, outer).lift(result, Scope(graph_module), ()))
    if not axes(expr):
        raise LiftError("flex_attention has a block mask without a mask_mod: its lists alone define it")
    return expr


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

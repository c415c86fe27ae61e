"""Folding of what mask builders leave behind, and what an expression is by its form alone."""

from __future__ import annotations

import math

from omnisparse_flex.masks.expr.expr import TRUE, Apply, Const, Expr, Load, axes, conjunction, walk

#: Operations that round to a narrow type.
ROUNDINGS = ("cast_half", "cast_bfloat16")


def simplify(expr: Expr) -> Expr:
    """Fold the trivial conjunctions that mask builders leave behind (``True & x``)."""
    if isinstance(expr, Load):
        return Load(expr.slot, tuple(simplify(a) for a in expr.at))
    if not isinstance(expr, Apply):
        return expr
    args = tuple(simplify(a) for a in expr.args)
    if expr.op == "and":
        return conjunction(*args)
    if expr.op == "or" and TRUE not in args:
        live = [a for a in args if a != Const(False)]
        return live[0] if len(live) == 1 else Apply("or", args) if live else Const(False)
    if expr.op in ("add", "sub") and args[1] in (Const(0), Const(0.0)):
        return args[0]
    if expr.op == "add" and args[0] in (Const(0), Const(0.0)):
        return args[1]
    if expr.op == "mul" and Const(1) in args:
        return args[1] if args[0] == Const(1) else args[0]
    if expr.op == "cast_bool" and is_boolean(args[0]):
        return args[0]
    if expr.op in ROUNDINGS and (indicator(args[0]) is not None or _is_whole(args[0])):
        return args[0]
    if expr.op == "where" and args[1:] == (TRUE, Const(False)) and is_boolean(args[0]):
        return args[0]
    if expr.op == "not" and isinstance(args[0], Apply):
        return _negated(args[0])
    return Apply(expr.op, args)


def indicator(expr: Expr) -> Expr | None:
    """The condition of a 0 / 1 valued expression, or None."""
    match expr:
        case Apply(op, (inner,)) if op == "cast_float" or op in ROUNDINGS:
            return inner if is_boolean(inner) else indicator(inner)
        case Apply("sub", (Const(1 | 1.0), inner)):
            inverse = indicator(inner)
            return None if inverse is None else Apply("not", (inverse,))
    return expr if is_boolean(expr) and axes(expr) else None


def _is_whole(expr: Expr) -> bool:
    """Whether every narrow type holds the value: 0, 1, infinity, and choices among them."""
    match expr:
        case Const(value):
            return value in (0, 1, math.inf, -math.inf)
        case Apply("where", (_, a, b)):
            return _is_whole(a) and _is_whole(b)
    return False


def _negated(expr: Apply) -> Expr:
    """``not expr``, without the ``not`` where that is exact: comparisons of indices know no NaN."""
    if expr.op == "not" and is_boolean(expr.args[0]):
        return expr.args[0]
    if expr.op in _OPPOSITES and not any(isinstance(node, Load) for node in walk(expr)):
        return Apply(_OPPOSITES[expr.op], expr.args)
    return Apply("not", (expr,))


_OPPOSITES = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}


def is_boolean(expr: Expr) -> bool:
    """Whether ``expr`` is boolean by its form alone (a ``Load`` is not: its tensor decides)."""
    if isinstance(expr, Const):
        return isinstance(expr.value, bool)
    if isinstance(expr, Apply):
        if expr.op in ("and", "or", "xor"):
            return all(is_boolean(a) or isinstance(a, Load) for a in expr.args)
        return expr.op in ("le", "lt", "ge", "gt", "eq", "ne", "not", "cast_bool")
    return False

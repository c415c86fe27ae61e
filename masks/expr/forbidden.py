"""What an additive mask forbids is a mask, wherever it comes from: constants, tensors, a score_mod."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omnisparse_flex.masks.expr.expr import (
    TRUE,
    Apply,
    Const,
    Expr,
    Load,
    axes,
    conjunction,
    walk,
)
from omnisparse_flex.masks.expr.simplify import ROUNDINGS, indicator, is_boolean

#: A constant at or under this means "not allowed".
NEGATIVE = -1e4
#: The same of a tensor's elements, whose values nobody knows before the run. Lower: a bias that falls with the distance
#: (ALiBi) gets to -1e5 over some 100K tokens, and where it is all that a row sees, softmax takes it for what it is.
FORBIDDEN = -1e6
#: Stands for the logit in what is read from a ``score_mod``.
SCORE = Load(-1, ())


def split_additive(expr: Expr, dtypes: Sequence[torch.dtype]) -> tuple[Expr, Expr | None]:
    """Split an additive mask into what it allows and what it adds.

    ``where(allowed, x, -inf)`` forbids; sums forbid what any term forbids; a tensor forbids where it holds -inf, the
    lowest number of its type, or less than ``FORBIDDEN``.

    Args:
        expr: Logits to be added.
        dtypes: Types of the tensors that its loads refer to.

    Returns:
        ``(allowed, bias)``; bias None where nothing is added.
    """
    match expr:
        case Const(value):
            return (Const(False), None) if value <= NEGATIVE else (TRUE, None if value == 0 else expr)
        case Apply("add", (a, b)):
            (allow_a, bias_a), (allow_b, bias_b) = split_additive(a, dtypes), split_additive(b, dtypes)
            biases = [x for x in (bias_a, bias_b) if x is not None]
            total = Apply("add", (biases[0], biases[1])) if len(biases) == 2 else biases[0] if biases else None
            return conjunction(allow_a, allow_b), total
        case Apply("sub", (a, Const(value))):
            return split_additive(Apply("add", (a, Const(-value))), dtypes)
        case Apply("where", (condition, a, b)) if not reads_score(condition):
            return _choice(expr, condition, split_additive(a, dtypes), split_additive(b, dtypes))
        case Apply("mul", (a, Const(value))) | Apply("mul", (Const(value), a)) if value <= NEGATIVE:
            if (blocked := indicator(a)) is not None:
                return Apply("not", (blocked,)), None
        case Apply("cast_float", (inner,)) if not is_boolean(inner):
            return split_additive(inner, dtypes)
        case Apply(rounded, (inner,)) if rounded in ROUNDINGS:
            allowed, bias = split_additive(inner, dtypes)
            return allowed, None if bias is None else Apply(rounded, (bias,))
    return (allowed_by(expr, dtypes), expr) if may_forbid(expr) else (TRUE, expr)


def _choice(
    expr: Expr, condition: Expr, if_true: tuple[Expr, Expr | None], if_false: tuple[Expr, Expr | None]
) -> tuple[Expr, Expr | None]:
    """``split_additive`` of ``where(condition, a, b)``, from that of both sides."""
    (allow_a, bias_a), (allow_b, bias_b) = if_true, if_false
    opposite = Apply("not", (condition,))
    if allow_b == Const(False):
        return conjunction(condition, allow_a), bias_a
    if allow_a == Const(False):
        return conjunction(opposite, allow_b), bias_b
    if allow_a == TRUE and allow_b == TRUE:
        return TRUE, expr
    allowed = Apply("or", (conjunction(condition, allow_a), conjunction(opposite, allow_b)))
    return allowed, expr


def may_forbid(expr: Expr) -> bool:
    """Whether what is added may be as low as a mask's; terms of queries alone shift whole rows and forbid nothing."""
    if "kv" not in axes(expr) or reads_score(expr):
        return False
    match expr:
        case Load():
            return True
        case Apply("where", (_, a, b)):
            return any(may_forbid(x) for x in (a, b))
        case Apply("add" | "sub", (a, b)):
            return may_forbid(a) or may_forbid(b)
        case Apply("neg" | "cast_float" | "cast_half" | "cast_bfloat16", (inner,)):
            return may_forbid(inner)
    # A tensor times a distance is a slope; times a number it is the tensor, and times a large number it is huge.
    large = any(isinstance(x, Const) and abs(x.value) >= -NEGATIVE for x in walk(expr))
    return large or (any(isinstance(x, Load) for x in walk(expr)) and "q" not in axes(expr))


def allowed_by(expr: Expr, dtypes: Sequence[torch.dtype]) -> Expr:
    """Where what is added is above what forbids."""
    halves = [x for x in walk(expr) if isinstance(x, Load) and dtypes[x.slot] == torch.float16]
    rounds = any(isinstance(x, Apply) and x.op == "cast_half" for x in walk(expr))
    limit = torch.finfo(torch.float16).min if halves or rounds else FORBIDDEN
    return Apply("gt", (expr, Const(limit)))


def reads_score(expr: Expr) -> bool:
    """Whether the logit itself is read: what comes of it is known of no pair before the run."""
    return any(x == SCORE for x in walk(expr))

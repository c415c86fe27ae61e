"""Interval arithmetic: the lowest and highest value of each operation from those of its operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (lowest, highest) value in each block.
Interval = tuple[Tensor, Tensor]


def _add(a: Interval, b: Interval) -> Interval:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Interval, b: Interval) -> Interval:
    return a[0] - b[1], a[1] - b[0]


def _mul(a: Interval, b: Interval) -> Interval:
    first, *others = [x * y for x in a for y in b]
    low = high = first
    for product in others:
        low, high = torch.minimum(low, product), torch.maximum(high, product)
    return low, high


def _floor_divide(a: Interval, b: Interval) -> Interval:
    """Exact for a known positive divisor; else as wide as a divisor of at least 1 makes it, or unbounded."""
    safe = (b[0] == b[1]) & (b[0] > 0)
    divisor = torch.where(safe, b[0], 1)  # by 0 integers are not divided
    low, high = (torch.div(x, divisor, rounding_mode="floor") for x in a)
    span = torch.maximum(a[0].abs(), a[1].abs()) + 1
    if low.dtype.is_floating_point:
        span = torch.full_like(low, torch.inf)
    return torch.where(safe, low, -span), torch.where(safe, high, span)


def _remainder(a: Interval, b: Interval) -> Interval:
    divisor = torch.where(b[0] == 0, 1, b[0])  # by 0 integers are not divided
    laps = [torch.div(x, divisor, rounding_mode="floor") for x in a]
    same_lap = (laps[0] == laps[1]) & (b[0] == b[1]) & (b[0] != 0)
    bound = torch.maximum(b[0].abs(), b[1].abs())
    low, high = (torch.remainder(x, divisor) for x in a)
    return torch.where(same_lap, low, -bound), torch.where(same_lap, high, bound)


def _abs(a: Interval) -> Interval:
    low = torch.where(a[0] > 0, a[0], torch.where(a[1] < 0, -a[1], torch.zeros_like(a[0] + a[1])))
    return low, torch.maximum(a[0].abs(), a[1].abs())


def _eq(a: Interval, b: Interval) -> Interval:
    return (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0]), (a[0] <= b[1]) & (b[0] <= a[1])


def _ne(a: Interval, b: Interval) -> Interval:
    surely, maybe = _eq(a, b)
    return ~maybe, ~surely


def _where(condition: Interval, a: Interval, b: Interval) -> Interval:
    low = torch.where(condition[0], a[0], torch.where(condition[1], torch.minimum(a[0], b[0]), b[0]))
    return low, torch.where(condition[0], a[1], torch.where(condition[1], torch.maximum(a[1], b[1]), b[1]))


def _xor(a: Interval, b: Interval) -> Interval:
    both_known = (a[0] == a[1]) & (b[0] == b[1])
    return both_known & (a[0] ^ b[0]), ~both_known | (a[0] ^ b[0])


def _monotone(function: Callable[[Tensor], Tensor]) -> Callable[[Interval], Interval]:
    return lambda a: (function(a[0]), function(a[1]))


#: By the names of ``expr.OPS``, but for and / or, which stay informative where one operand is unknown.
RULES: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "neg": lambda a: (-a[1], -a[0]),
    "abs": _abs,
    "minimum": lambda a, b: (torch.minimum(a[0], b[0]), torch.minimum(a[1], b[1])),
    "maximum": lambda a, b: (torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])),
    "le": lambda a, b: (a[1] <= b[0], a[0] <= b[1]),
    "lt": lambda a, b: (a[1] < b[0], a[0] < b[1]),
    "ge": lambda a, b: (a[0] >= b[1], a[1] >= b[0]),
    "gt": lambda a, b: (a[0] > b[1], a[1] > b[0]),
    "eq": _eq,
    "ne": _ne,
    "xor": _xor,
    "not": lambda a: (~a[1].to(torch.bool), ~a[0].to(torch.bool)),
    "where": _where,
    "cast_bool": lambda a: ((a[0] > 0) | (a[1] < 0), (a[0] != 0) | (a[1] != 0)),
    "cast_int": _monotone(lambda x: x.to(torch.int64)),
    "cast_float": _monotone(lambda x: x.to(torch.float32)),
    "cast_half": _monotone(lambda x: x.to(torch.float16).to(torch.float32)),
    "cast_bfloat16": _monotone(lambda x: x.to(torch.bfloat16).to(torch.float32)),
    "tanh": _monotone(torch.tanh),
    "exp": _monotone(torch.exp),
}

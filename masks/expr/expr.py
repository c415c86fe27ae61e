"""A mask or bias as an expression over (batch, head, query, key) indices.

Lifting turns a model's N x N mask tensor into an ``Expr``; this file evaluates one
element-wise (inside a FlexAttention ``mask_mod``), ``block_bounds.py`` bounds it over blocks.
Large tensors never appear: a leaf is an index, a constant, or an element of a small
captured tensor.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Axis = Literal["b", "h", "q", "kv"]
Scalar: TypeAlias = bool | int | float


@dataclasses.dataclass(frozen=True, slots=True)
class Const:
    """A Python number."""

    value: Scalar


@dataclasses.dataclass(frozen=True, slots=True)
class Index:
    """One of the four coordinates of an attention pair."""

    axis: Axis


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """An element of captured tensor number ``slot``, at one expression per dimension."""

    slot: int
    at: tuple[Expr, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """A pointwise operation from ``OPS``."""

    op: str
    args: tuple[Expr, ...]


Expr: TypeAlias = Const | Index | Load | Apply

B, H, Q, KV = Index("b"), Index("h"), Index("q"), Index("kv")
TRUE = Const(True)

#: The pointwise vocabulary; names follow aten's. ``cast_*`` are dtype changes.
OPS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": torch.true_divide,
    "floor_divide": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "remainder": torch.remainder,
    "neg": operator.neg,
    "abs": torch.abs,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "log": torch.log,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": torch.logical_not,
    "where": torch.where,
    "cast_bool": lambda a: a.to(torch.bool),
    "cast_int": lambda a: a.to(torch.int64),
    "cast_float": lambda a: a.to(torch.float32),
    # What a narrow type keeps of a number.
    "cast_half": lambda a: a.to(torch.float16).to(torch.float32),
    "cast_bfloat16": lambda a: a.to(torch.bfloat16).to(torch.float32),
}

Loader: TypeAlias = Callable[[int, tuple[Tensor, ...]], Tensor]


def evaluate(expr: Expr, load: Loader, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """Value of ``expr`` at index tensors that broadcast together.

    Args:
        expr: What to evaluate.
        load: ``(slot, indices) -> element`` of the captured tensors.
        b: Batch index, int tensor.
        h: Query-head index, int tensor.
        q: Query index (row of the attention matrix, without offset), int tensor.
        kv: Key index, int tensor.

    Returns:
        A tensor of the broadcast shape (or smaller, where an axis does not matter).
    """
    env = {"b": b, "h": h, "q": q, "kv": kv}

    def walk(node: Expr) -> Any:
        match node:
            case Const(value):
                return value
            case Index(axis):
                return env[axis]
            case Load(slot, at):
                return load(slot, tuple(_as_index(walk(i), q) for i in at))
            case Apply(op, args):
                values = [walk(a) for a in args]
                if not any(isinstance(v, Tensor) for v in values) or op in (
                    "minimum",
                    "maximum",
                    "where",
                    "not",
                    "xor",
                ):
                    values = [torch.as_tensor(v, device=q.device) for v in values]
                return OPS[op](*values)

    value = walk(expr)
    return value if isinstance(value, Tensor) else torch.full_like(kv, value, dtype=_dtype_of(value))


def number_in(expr: Expr, buffers: Sequence[Tensor], device: torch.device) -> Tensor | int:
    """The whole number that an expression without coordinates comes to: a 0-d int64 tensor, where it reads tensors."""
    if isinstance(expr, Const):
        return math.floor(expr.value)
    origin = torch.zeros((), dtype=torch.int64, device=device)
    value = evaluate(expr, plain_load(buffers), origin, origin, origin, origin)
    whole: Tensor = (value.floor() if value.is_floating_point() else value).to(torch.int64).reshape(())
    return whole


def plain_load(buffers: Sequence[Tensor]) -> Loader:
    """The ordinary loader: advanced indexing into the captured tensors."""

    def load(slot: int, at: tuple[Tensor, ...]) -> Tensor:
        return buffers[slot][at] if at else buffers[slot]

    return load


def walk(expr: Expr) -> Iterator[Expr]:
    """``expr`` and all its sub-expressions, parents first."""
    yield expr
    children: tuple[Expr, ...] = ()
    if isinstance(expr, Load):
        children = expr.at
    elif isinstance(expr, Apply):
        children = expr.args
    for child in children:
        yield from walk(child)


def axes(expr: Expr) -> frozenset[str]:
    """The coordinates ``expr`` depends on."""
    return frozenset(node.axis for node in walk(expr) if isinstance(node, Index))


def conjuncts(expr: Expr) -> list[Expr]:
    """``expr`` split at its top-level conjunctions."""
    if isinstance(expr, Apply) and expr.op == "and":
        return [part for arg in expr.args for part in conjuncts(arg)]
    return [expr]


def conjunction(*parts: Expr) -> Expr:
    """The conjunction of ``parts``; constant true parts vanish."""
    kept = [part for part in parts if part != TRUE]
    if not kept:
        return TRUE
    result = kept[0]
    for part in kept[1:]:
        result = Apply("and", (result, part))
    return result


def shift_slots(expr: Expr, by: int) -> Expr:
    """``expr`` with every load's slot moved by ``by``, for masks that are joined."""
    if isinstance(expr, Load):
        return Load(expr.slot + by, tuple(shift_slots(a, by) for a in expr.at))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(shift_slots(a, by) for a in expr.args))
    return expr


def causal(offset: Expr | None = None) -> Expr:
    """``kv <= q + offset``: query row q sits at position q + offset; None: 0."""
    # No expression as a default: Dynamo of torch 2.11 cannot wrap one.
    return Apply("le", (KV, Q if offset in (None, Const(0)) else Apply("add", (Q, offset))))


def causal_offset(expr: Expr) -> Expr | None:
    """The offset of the first causal conjunct ``kv <= q + offset`` (or ``q + offset >= kv``), if any."""
    for part in conjuncts(expr):
        if not isinstance(part, Apply) or part.op not in ("le", "ge"):
            continue
        key, query = part.args if part.op == "le" else part.args[::-1]
        if key != KV:
            continue
        if query == Q:
            return Const(0)
        if isinstance(query, Apply) and query.op == "add" and Q in query.args:
            other = query.args[1] if query.args[0] == Q else query.args[0]
            if not axes(other):
                return other
    return None


def _as_index(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device=like.device)


def _dtype_of(value: Scalar) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32

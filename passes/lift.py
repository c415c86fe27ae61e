"""Read a mask tensor's graph backwards into an expression over (b, h, q, kv)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from omnisparse_flex.attention.scalar_graph import HALVES, cast_of
from omnisparse_flex.masks.expr.expr import Apply, Const, Expr
from omnisparse_flex.passes.arguments import arguments, is_plain
from omnisparse_flex.passes.lift_base import Indices, LiftError
from omnisparse_flex.passes.lift_shapes import ShapeRules
from omnisparse_flex.passes.nodes import op_name, value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.writes import mutations

#: Dynamo-level operation name -> name in ``masks.expr.OPS``.
POINTWISE: dict[str, str] = {
    **{n: n for n in ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "remainder", "where")},
    **{n: n for n in ("le", "lt", "ge", "gt", "eq", "ne", "log", "exp", "sqrt", "tanh", "floor_divide")},
    **{"subtract": "sub", "multiply": "mul", "negative": "neg", "truediv": "div", "div": "div"},
    **{"floordiv": "floor_divide", "mod": "remainder", "min": "minimum", "max": "maximum"},
    **{"less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt", "not_equal": "ne"},
    **{f"{how}{op}": op for how in ("", "bitwise_", "logical_") for op in ("and", "or", "xor", "not")},
    **{"invert": "not", "inv": "not"},
}
#: Operations with one operand.
_ONE = ("neg", "abs", "log", "exp", "sqrt", "tanh", "not")
#: Operations whose result a narrow type rounds.
_ROUNDS = ("add", "sub", "mul", "div", "floor_divide", "remainder", "log", "exp", "sqrt", "tanh")
#: Types of integers in which positions do not fit.
_NARROW = (torch.int8, torch.uint8, torch.int16)
#: Types that hold positions exactly, for up to 2^24 tokens.
_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
_SAME = ("contiguous", "clone", "detach", "alias", "requires_grad_", "expand", "expand_as", "broadcast_to")
_CASTS = ("to", "type", "type_as", "bool", "float", "int", "long", "half", "bfloat16", "double")
_FILLS = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_VIEWS = ("view", "reshape", "unflatten", "flatten")


class Lifter(ShapeRules):
    """Lifts values of one site's mask; small tensors that it meets become leaves."""

    def lift(self, node: Any, scope: Scope, at: Indices) -> Expr:
        """The value of ``node`` at position ``at``.

        Args:
            node: A node of ``scope``'s graph, or a number.
            scope: Where it lives.
            at: One expression per dimension of the node's value.

        Returns:
            The expression.

        Raises:
            LiftError: If an N x N tensor would have to be captured.
        """
        if not isinstance(node, Node):
            if isinstance(node, (bool, int, float)):
                return Const(node)
            raise LiftError(f"the mask uses the value {node!r}")
        if node in self.inputs:
            return self.inputs[node]
        if node.op == "placeholder" and node not in self.outer:
            outer = scope.operand_of(node)
            if outer is not None and scope.parent is not None:
                inner_reader, self.reader = self.reader, scope.call
                result = self.lift(outer, scope.parent, at)
                self.reader = inner_reader
                return result
            self._check_unchanged(node)
            return self._leaf(node, scope, at)
        self._check_unchanged(node)
        rule = self._rule(node)
        if rule is None:
            return self._leaf(node, scope, at)
        value = value_of(node)
        before = self.reader, self.detached
        # No gradient passes a value that requires none: detached, compared, made without gradients.
        self.reader, self.detached = node, self.detached or not value.requires_grad
        result = rule(node, scope, at)
        self.reader, self.detached = before
        return result

    def _check_unchanged(self, node: Node) -> None:
        if self.reader is not None and any(change < self.reader for change in mutations(node)):
            raise LiftError(f"mask {node.name} is changed in place before it is read")

    def _rule(self, node: Node) -> Callable[[Node, Scope, Indices], Expr] | None:
        name = op_name(node)
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return None
        if name in POINTWISE:
            return self._pointwise
        if name in _SAME:
            return self._broadcast
        if name in _CASTS:
            return self._cast
        if name in _FILLS or name in ("full", "full_like", "new_full"):
            return self._fill
        if name in _VIEWS:
            return self._view
        by_name: dict[str, Callable[[Node, Scope, Indices], Expr]] = {
            "arange": self._arange,
            "getitem": self._getitem,
            "unsqueeze": self._unsqueeze,
            "squeeze": self._view,
            "transpose": self._transpose,
            "permute": self._permute,
            "masked_fill": self._masked_fill,
            "embedding": self._embedding,
            "tril": self._triangle,
            "triu": self._triangle,
            "pow": self._power,
            "clamp": self._clamp,
            "clip": self._clamp,
            "clamp_min": self._clamp,
            "clamp_max": self._clamp,
        }
        return by_name.get(name)

    def _pointwise(self, node: Node, scope: Scope, at: Indices) -> Expr:
        op = POINTWISE[op_name(node)]
        operands = arguments(node, "condition", "input", "other", "rounding_mode", "alpha")
        rounding = None if operands is None else operands["rounding_mode"]
        if operands is None or rounding not in (None, "floor") or operands["alpha"] not in (None, 1):
            return self._leaf(node, scope, at)
        if op == "div" and rounding == "floor":
            op = "floor_divide"
        wanted = {"where": ("condition", "input", "other")}.get(op, ("input",) if op in _ONE else ("input", "other"))
        args = [operands[name] for name in wanted]
        if any(arg is None for arg in args):  # of another signature: where(condition), max(x)
            return self._leaf(node, scope, at)
        if op in ("and", "or", "xor", "not"):
            if value_of(node).dtype != torch.bool:  # of bits, not of truth values
                return self._leaf(node, scope, at)
            return Apply(op, tuple(self._truth(arg, scope, at) for arg in args))
        if op in ("minimum", "maximum") and not isinstance(args[1], Node):
            return self._leaf(node, scope, at)
        result = Apply(op, tuple(self._operand(arg, scope, at) for arg in args))
        return _rounded(result, value_of(node).dtype) if op in _ROUNDS else result

    def _truth(self, arg: Any, scope: Scope, at: Indices) -> Expr:
        value, inner = value_of(arg), self._operand(arg, scope, at)
        is_bool = value.dtype == torch.bool if isinstance(value, torch.Tensor) else isinstance(value, bool)
        return inner if is_bool else Apply("cast_bool", (inner,))

    def _clamp(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "min", "max")
        if operands is None:
            return self._leaf(node, scope, at)
        result = self._operand(operands["input"], scope, at)
        for name, op in (("min", "maximum"), ("max", "minimum")):
            if operands[name] is not None:
                result = Apply(op, (result, self._operand(operands[name], scope, at)))
        return result

    def _broadcast(self, node: Node, scope: Scope, at: Indices) -> Expr:
        known = is_plain(node, "size", "other", "implicit") and isinstance(node.args[0], Node)
        return self._operand(node.args[0], scope, at) if known else self._leaf(node, scope, at)

    def _cast(self, node: Node, scope: Scope, at: Indices) -> Expr:
        source, after = node.args[0], value_of(node).dtype
        if not is_plain(node, "dtype", "other") or not isinstance(source, Node) or after in _NARROW:
            return self._leaf(node, scope, at)
        inner, before = self._operand(source, scope, at), value_of(source).dtype
        return inner if before == after else _rounded(Apply(cast_of(after), (inner,)), after)

    def _fill(self, node: Node, scope: Scope, at: Indices) -> Expr:
        name = op_name(node)
        if name in _FILLS:
            number: Any = _FILLS[name] if is_plain(node, "size", "dtype", "input") else None
        else:
            number = (arguments(node, "size", "input", "fill_value", "dtype") or {}).get("fill_value")
        if not isinstance(number, (bool, int, float)):
            return self._leaf(node, scope, at)
        return _constant(number, value_of(node).dtype)

    def _arange(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "start", "end", "step", "dtype")
        if operands is None or value_of(node).dtype not in _EXACT:
            return self._leaf(node, scope, at)
        start, step = operands["start"] if operands["end"] is not None else 0, operands["step"]
        start, step = (0 if start is None else start), (1 if step is None else step)
        if any(isinstance(value_of(x), (float, torch.SymFloat)) for x in (start, step)):
            return self._leaf(node, scope, at)  # their multiples are rounded
        moved = at[0] if step == 1 else Apply("mul", (at[0], self.lift(step, scope, ())))
        return moved if start == 0 else Apply("add", (moved, self.lift(start, scope, ())))

    def _masked_fill(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "mask", "value")
        if operands is None:
            return self._leaf(node, scope, at)
        return Apply("where", tuple(self._operand(operands[x], scope, at) for x in ("mask", "value", "input")))

    def _embedding(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "weight") if node.target is F.embedding else None
        if operands is None or not isinstance(operands["weight"], Node):
            return self._leaf(node, scope, at)
        return self._captured(operands["weight"], scope, (self._operand(operands["input"], scope, at[:-1]), at[-1]))

    def _triangle(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "diagonal")
        if operands is None:
            return self._leaf(node, scope, at)
        diagonal = 0 if operands["diagonal"] is None else operands["diagonal"]
        edge = Apply("add", (at[-2], self.lift(diagonal, scope, ()))) if diagonal != 0 else at[-2]
        inside = Apply("le" if op_name(node) == "tril" else "ge", (at[-1], edge))
        zero = Const(False) if value_of(node).dtype == torch.bool else Const(0)
        return Apply("where", (inside, self._operand(operands["input"], scope, at), zero))

    def _power(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "exponent")
        if operands is None or operands["exponent"] != 2:
            return self._leaf(node, scope, at)
        base = self._operand(operands["input"], scope, at)
        return _rounded(Apply("mul", (base, base)), value_of(node).dtype)


def _rounded(expr: Expr, dtype: torch.dtype) -> Expr:
    """``expr`` as a tensor of ``dtype`` holds it, where that is less than float32 holds."""
    name = HALVES.get(dtype)
    return expr if name is None else Apply(name, (expr,))


def _constant(number: Any, dtype: torch.dtype) -> Const:
    """What a tensor of ``dtype`` holds of a number."""
    if dtype == torch.bool:
        return Const(bool(number))
    return Const(torch.tensor(number, dtype=dtype).item())

"""Read a mask tensor's graph backwards into an expression over (b, h, q, kv)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from omnisparse_flex.masks.expr.expr import Apply, Const, Expr
from omnisparse_flex.masks.expr.program import cast_of
from omnisparse_flex.passes.lift_base import Indices, LiftError
from omnisparse_flex.passes.lift_shapes import ShapeRules
from omnisparse_flex.passes.nodes import mutations, op_name, value_of
from omnisparse_flex.passes.scope import Scope

#: Dynamo-level operation name -> name in ``masks.expr.OPS``.
POINTWISE: dict[str, str] = {
    **{n: n for n in ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "remainder", "where")},
    **{n: n for n in ("le", "lt", "ge", "gt", "eq", "ne", "log", "exp", "sqrt", "tanh", "floor_divide")},
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
    "truediv": "div",
    "div": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "and": "and",
    "bitwise_and": "and",
    "logical_and": "and",
    "or": "or",
    "bitwise_or": "or",
    "logical_or": "or",
    "xor": "xor",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "invert": "not",
    "inv": "not",
    "not": "not",
    "bitwise_not": "not",
    "logical_not": "not",
    "min": "minimum",
    "max": "maximum",
}
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
        outer_reader, self.reader = self.reader, node
        result = rule(node, scope, at)
        self.reader = outer_reader
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
        if op == "div" and node.kwargs.get("rounding_mode") == "floor":
            op = "floor_divide"
        args = list(node.args)
        if op in ("and", "or", "xor", "not"):
            if value_of(node).dtype != torch.bool:  # of bits, not of truth values
                return self._leaf(node, scope, at)
            return Apply(op, tuple(self._truth(arg, scope, at) for arg in args))
        if node.kwargs.get("rounding_mode") == "trunc":
            return self._leaf(node, scope, at)
        if (op == "where" and len(args) != 3) or (op in ("minimum", "maximum") and len(args) != 2):
            return self._leaf(node, scope, at)
        if op in ("minimum", "maximum") and not isinstance(args[1], Node):
            return self._leaf(node, scope, at)
        if node.kwargs.get("alpha", 1) != 1:
            return self._leaf(node, scope, at)
        return Apply(op, tuple(self._operand(arg, scope, at) for arg in args))

    def _truth(self, arg: Any, scope: Scope, at: Indices) -> Expr:
        value, inner = value_of(arg), self._operand(arg, scope, at)
        is_bool = value.dtype == torch.bool if isinstance(value, torch.Tensor) else isinstance(value, bool)
        return inner if is_bool else Apply("cast_bool", (inner,))

    def _clamp(self, node: Node, scope: Scope, at: Indices) -> Expr:
        names = ("input", "max", "min") if op_name(node) == "clamp_max" else ("input", "min", "max")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        result = self._operand(given["input"], scope, at)
        for name, op in (("min", "maximum"), ("max", "minimum")):
            bound = given.get(name)
            if bound is not None:
                result = Apply(op, (result, self._operand(bound, scope, at)))
        return result

    def _broadcast(self, node: Node, scope: Scope, at: Indices) -> Expr:
        return self._operand(node.args[0], scope, at)

    def _cast(self, node: Node, scope: Scope, at: Indices) -> Expr:
        source = node.args[0]
        inner = self._operand(source, scope, at)
        before, after = value_of(source).dtype, value_of(node).dtype
        return inner if before == after else Apply(cast_of(after), (inner,))

    def _fill(self, node: Node, scope: Scope, at: Indices) -> Expr:
        name = op_name(node)
        if name in _FILLS:
            number: Any = _FILLS[name]
        else:
            position = 2 if name == "new_full" else 1
            number = node.kwargs.get("fill_value", node.args[position] if len(node.args) > position else None)
        if not isinstance(number, (bool, int, float)):
            return self._leaf(node, scope, at)
        dtype = value_of(node).dtype
        return Const(bool(number) if dtype == torch.bool else float(number) if dtype.is_floating_point else number)

    def _arange(self, node: Node, scope: Scope, at: Indices) -> Expr:
        bounds = [node.kwargs[k] for k in ("start", "end", "step") if k in node.kwargs]
        bounds = [*node.args, *bounds]
        start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
        moved = at[0] if step == 1 else Apply("mul", (at[0], self.lift(step, scope, ())))
        return moved if start == 0 else Apply("add", (moved, self.lift(start, scope, ())))

    def _masked_fill(self, node: Node, scope: Scope, at: Indices) -> Expr:
        source, condition, fill = node.args[:3]
        return Apply("where", tuple(self._operand(x, scope, at) for x in (condition, fill, source)))

    def _embedding(self, node: Node, scope: Scope, at: Indices) -> Expr:
        index, weight = node.args[:2]
        if not isinstance(weight, Node):
            return self._leaf(node, scope, at)
        return self._captured(weight, scope, (self._operand(index, scope, at[:-1]), at[-1]))

    def _triangle(self, node: Node, scope: Scope, at: Indices) -> Expr:
        diagonal = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        edge = Apply("add", (at[-2], self.lift(diagonal, scope, ()))) if diagonal != 0 else at[-2]
        inside = Apply("le" if op_name(node) == "tril" else "ge", (at[-1], edge))
        zero = Const(False) if value_of(node).dtype == torch.bool else Const(0)
        return Apply("where", (inside, self._operand(node.args[0], scope, at), zero))

    def _power(self, node: Node, scope: Scope, at: Indices) -> Expr:
        if node.args[1] != 2:
            return self._leaf(node, scope, at)
        base = self._operand(node.args[0], scope, at)
        return Apply("mul", (base, base))

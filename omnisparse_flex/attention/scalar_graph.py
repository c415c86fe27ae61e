"""A mask from an aten graph over scalar indices: what tracing a ``mask_mod`` records, and a flex call holds."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from omnisparse_flex.masks.expr.expr import Apply, Const, Expr, Index, Load
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.simplify import simplify

#: aten operator name (without overload) -> name in ``expr.OPS``.
ATEN_OPS: dict[str, str] = {
    **{name: name for name in ("add", "sub", "mul", "div", "neg", "abs", "remainder", "minimum", "maximum")},
    **{name: name for name in ("le", "lt", "ge", "gt", "eq", "ne", "where", "log", "exp", "sqrt", "tanh")},
    "floor_divide": "floor_divide",
    "bitwise_and": "and",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "bitwise_not": "not",
    "logical_not": "not",
}
#: Types that hold less than float32, by the operation that rounds to them.
HALVES = {torch.float16: "cast_half", torch.bfloat16: "cast_bfloat16"}


class UntraceableError(Exception):
    """A mask function uses operations that have no index-expression form."""


def read_scalar_graph(graph: GraphModule, captures: tuple[Tensor, ...] = (), first: tuple[Expr, ...] = ()) -> IndexMask:
    """Read an aten graph over scalars ``(*first, b, h, q, kv, *captures)``.

    Args:
        graph: What ``make_fx`` (or the flex HOP) recorded.
        captures: Values of the placeholders beyond the four indices.
        first: What stands for the placeholders before them.

    Returns:
        The expression; tensors the graph owns are appended to ``captures``.

    Raises:
        UntraceableError: On an operation outside the vocabulary.
    """
    reader = _ScalarReader(graph, list(captures), first)
    result = reader.run()
    return IndexMask(simplify(result), tuple(reader.buffers))


class _ScalarReader:
    """One walk over a scalar aten graph; each node becomes an ``Expr`` or a captured slot."""

    def __init__(self, graph: GraphModule, buffers: list[Tensor], first: tuple[Expr, ...]) -> None:
        self.first = first
        self.graph = graph
        self.buffers = buffers
        self.slots: dict[Node, int] = {}
        self.values: dict[Node, Expr] = {}

    def run(self) -> Expr:
        inputs: list[Expr] = [*self.first, Index("b"), Index("h"), Index("q"), Index("kv")]
        captured = 0
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if inputs:
                    self.values[node] = inputs.pop(0)
                else:
                    self.slots[node] = captured
                    captured += 1
            elif node.op == "get_attr":
                self.slots[node] = len(self.buffers)
                self.buffers.append(getattr(self.graph, node.target))
            elif node.op == "call_function":
                self._call(node)
            else:
                (result,) = node.args
                return self._expr(result[0] if isinstance(result, (list, tuple)) else result)
        raise UntraceableError("mask_mod returns nothing")

    def _call(self, node: Node) -> None:
        name = aten_name(node.target)
        if name in ("alias", "clone", "detach", "lift_fresh_copy", "expand", "view"):
            source = node.args[0]
            assert isinstance(source, Node)
            if source in self.slots:
                if node.meta["val"].shape != self.buffers[self.slots[source]].shape:
                    raise UntraceableError("mask_mod reshapes a captured tensor")
                self.slots[node] = self.slots[source]
            else:
                self.values[node] = self._expr(source)
        elif name in ("index", "_unsafe_index"):
            source, indices = cast(Node, node.args[0]), cast("list[Node]", node.args[1])
            if source not in self.slots or any(i is None for i in indices):
                raise UntraceableError("mask_mod indexes a computed tensor")
            at = tuple(self._expr(i) for i in indices)
            if len(at) != self.buffers[self.slots[source]].dim():
                raise UntraceableError("mask_mod indexes only some dimensions of a captured tensor")
            self.values[node] = Load(self.slots[source], at)
        elif name in ("new_ones", "ones_like", "ones", "new_zeros", "zeros_like", "zeros"):
            number = int("ones" in name)
            self.values[node] = Const(bool(number) if _dtype_of(node) == torch.bool else number)
        elif name == "full" or name == "full_like":
            self.values[node] = Const(node.args[1])  # type: ignore[arg-type]
        elif name == "_to_copy":
            dtype = cast(torch.dtype, node.kwargs["dtype"])
            if dtype in (torch.int8, torch.uint8, torch.int16):
                raise UntraceableError(f"mask_mod casts to {dtype}, in which positions do not fit")
            self.values[node] = self._rounded(node, Apply(cast_of(dtype), (self._expr(node.args[0]),)))
        else:
            self.values[node] = self._pointwise(node, name)

    def _pointwise(self, node: Node, name: str) -> Expr:
        op = ATEN_OPS.get(name)
        if op is None or node.kwargs.get("rounding_mode") == "trunc":
            raise UntraceableError(f"mask_mod uses {node.target}, which has no index form")
        if name == "div" and node.kwargs.get("rounding_mode") == "floor":
            op = "floor_divide"
        if op in ("and", "or") and len(node.args) != 2:
            raise UntraceableError(f"mask_mod uses {node.target} with {len(node.args)} arguments")
        args = [self._expr(a) for a in node.args]
        if op in ("and", "or", "xor", "not"):
            if _dtype_of(node) != torch.bool:
                # Of bits, neither truth nor bounds are those of the logical operation.
                raise UntraceableError(f"mask_mod uses {node.target} on integers")
            args = [
                x if _dtype_of(a) == torch.bool else Apply("cast_bool", (x,))
                for x, a in zip(args, node.args, strict=True)
            ]
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            args[1] = Apply("mul", (args[1], self._expr(alpha)))
        return self._rounded(node, Apply(op, tuple(args)))

    def _rounded(self, node: Node, expr: Expr) -> Expr:
        """``expr`` as a tensor of the node's type holds it, where that is less than float32 holds."""
        name = HALVES.get(node.meta["val"].dtype)
        return expr if name is None else Apply(name, (expr,))

    def _expr(self, value: object) -> Expr:
        if isinstance(value, Node):
            if value in self.slots:
                return Load(self.slots[value], ())
            return self.values[value]
        if isinstance(value, (bool, int, float)):
            return Const(value)
        raise UntraceableError(f"mask_mod uses the value {value!r}")


def aten_name(target: object) -> str:
    """``aten.le.Tensor`` -> ``le``; anything else -> its own name."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def cast_of(dtype: torch.dtype) -> str:
    """The cast operation that stands for a conversion to ``dtype``."""
    if dtype == torch.bool:
        return "cast_bool"
    return "cast_float" if dtype.is_floating_point else "cast_int"


def _dtype_of(value: object) -> torch.dtype | None:
    """What tracing recorded for a node; numbers by their Python type, None for other than bool."""
    if isinstance(value, Node):
        dtype: torch.dtype = value.meta["val"].dtype
        return dtype
    return torch.bool if isinstance(value, bool) else None

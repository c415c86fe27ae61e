"""Lifting rules that only move indices: views, transposes, slices, gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from omnisparse_flex.masks.expr.expr import Apply, Const, Expr
from omnisparse_flex.passes.arguments import arguments, is_plain
from omnisparse_flex.passes.lift_base import Indices, Reader, is_one
from omnisparse_flex.passes.nodes import shape_of, value_of
from omnisparse_flex.passes.scope import Scope


class ShapeRules(Reader):
    """Where an element of the result comes from in the source."""

    def _unsqueeze(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "dim")
        if operands is None or not isinstance(operands["dim"], int):
            return self._leaf(node, scope, at)
        dim = operands["dim"] % len(at)
        return self.lift(operands["input"], scope, at[:dim] + at[dim + 1 :])

    def _transpose(self, node: Node, scope: Scope, at: Indices) -> Expr:
        operands = arguments(node, "input", "dim0", "dim1")
        if operands is None or not (isinstance(operands["dim0"], int) and isinstance(operands["dim1"], int)):
            return self._leaf(node, scope, at)
        moved = list(at)
        a, b = operands["dim0"] % len(at), operands["dim1"] % len(at)
        moved[a], moved[b] = moved[b], moved[a]
        return self.lift(operands["input"], scope, tuple(moved))

    def _permute(self, node: Node, scope: Scope, at: Indices) -> Expr:
        order: Any = node.args[1:2] and (node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])
        if not is_plain(node) or len(order) != len(at) or not all(isinstance(d, int) for d in order):
            return self._leaf(node, scope, at)
        moved = list(at)
        for position, source in enumerate(order):
            moved[source % len(at)] = at[position]
        return self.lift(node.args[0], scope, tuple(moved))

    def _view(self, node: Node, scope: Scope, at: Indices) -> Expr:
        """Reshapes that only insert or drop dimensions of size 1."""
        source = node.args[0]
        if not isinstance(source, Node) or value_of(source).dtype != value_of(node).dtype:  # view(dtype)
            return self._leaf(node, scope, at)
        kept = [(size, index) for size, index in zip(shape_of(node), at, strict=True) if not is_one(size)]
        wanted = [size for size in shape_of(source) if not is_one(size)]
        if len(kept) != len(wanted) or any(a is not b and a != b for (a, _), b in zip(kept, wanted, strict=True)):
            return self._leaf(node, scope, at)
        rest = iter(index for _, index in kept)
        return self.lift(source, scope, tuple(Const(0) if is_one(s) else next(rest) for s in shape_of(source)))

    def _getitem(self, node: Node, scope: Scope, at: Indices) -> Expr:
        source, key = node.args[0], node.args[1]
        key = key if isinstance(key, tuple) else (key,)
        if not isinstance(source, Node) or not (source in self.inputs or isinstance(value_of(source), torch.Tensor)):
            return self._leaf(node, scope, at)  # of several results
        if any(_is_tensor(k) or k in self.inputs for k in key if isinstance(k, Node)):
            return self._gather(node, source, key, scope, at)
        shape = shape_of(source)
        own = list(at)
        indices: list[Expr] = []
        for item in _expand_ellipsis(key, len(shape)):
            if item is None:
                own.pop(0)
                continue
            place = self._place(item, shape[len(indices)], own, scope)
            if place is None:
                return self._leaf(node, scope, at)
            indices.append(place)
        return self.lift(source, scope, tuple(indices) + tuple(own))

    def _place(self, item: Any, size: Any, own: list[Expr], scope: Scope) -> Expr | None:
        """The index into a dimension of ``size`` that ``item`` picks; a slice takes the next of ``own``.

        None where it is not known before the run: what counts from the end of a length that may be any.
        """
        if isinstance(item, bool) or not isinstance(item, (int, slice)):
            return None
        if isinstance(item, int):
            known = item >= 0 or isinstance(size, int)
            return Const(item if item >= 0 else size + item) if known else None
        step = 1 if item.step is None else item.step
        start = _start(0 if item.start is None else item.start, size)
        if not isinstance(step, int) or step < 1 or start is None:
            return None
        index = own.pop(0)
        moved = index if step == 1 else Apply("mul", (index, Const(step)))
        return moved if start == 0 else Apply("add", (moved, self.lift(start, scope, ())))

    def _gather(self, node: Node, source: Node, key: Sequence[Any], scope: Scope, at: Indices) -> Expr:
        """``source[:, i, j]``: the index tensors broadcast, side by side; whole dimensions may stand around them."""
        held = self.outer[source].node if source in self.outer else source
        assert held is not None
        rank = len(shape_of(held))
        items = _expand_ellipsis(key, rank)
        items += [slice(None)] * (rank - len(items))
        places = [i for i, item in enumerate(items) if item != slice(None)]
        first, last = places[0], places[-1] + 1
        indices = items[first:last]
        if not all(
            isinstance(k, int) or (isinstance(k, Node) and (_is_tensor(k) or k in self.inputs)) for k in indices
        ):
            return self._leaf(node, scope, at)
        end = len(at) - (rank - last)
        operands = tuple(self._operand(k, scope, at[first:end]) for k in indices)
        return self._captured(source, scope, at[:first] + operands + at[end:])


def _is_tensor(key: Any) -> bool:
    return isinstance(key, Node) and isinstance(value_of(key), torch.Tensor)


def _start(start: Any, size: Any) -> Any:
    """Where a slice starts, counted from the front: a number, or a node that is surely not negative; else None."""
    if isinstance(start, bool) or not isinstance(start, (int, Node)):
        return None
    if isinstance(start, Node):
        value = value_of(start)
        if isinstance(value, int):
            start = value
        elif isinstance(value, torch.SymInt) and statically_known_true(value >= 0):
            return start
        else:
            return None
    if start >= 0:
        return start
    return max(size + start, 0) if isinstance(size, int) else None


def _expand_ellipsis(key: Sequence[Any], rank: int) -> list[Any]:
    used = sum(1 for k in key if k is not None and k is not Ellipsis)
    items: list[Any] = []
    for item in key:
        items += [slice(None)] * (rank - used) if item is Ellipsis else [item]
    return items

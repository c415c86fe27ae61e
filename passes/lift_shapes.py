"""Lifting rules that only move indices: views, transposes, slices, gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from omnisparse_flex.masks.expr.expr import Apply, Const, Expr
from omnisparse_flex.passes.lift_base import Indices, Reader, is_one
from omnisparse_flex.passes.nodes import shape_of, value_of
from omnisparse_flex.passes.scope import Scope


class ShapeRules(Reader):
    """Where an element of the result comes from in the source."""

    def _unsqueeze(self, node: Node, scope: Scope, at: Indices) -> Expr:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(dim, int):
            return self._leaf(node, scope, at)
        dim %= len(at)
        return self.lift(node.args[0], scope, at[:dim] + at[dim + 1 :])

    def _transpose(self, node: Node, scope: Scope, at: Indices) -> Expr:
        moved = list(at)
        a, b = (int(d) % len(at) for d in node.args[1:3])  # type: ignore[arg-type]
        moved[a], moved[b] = moved[b], moved[a]
        return self.lift(node.args[0], scope, tuple(moved))

    def _permute(self, node: Node, scope: Scope, at: Indices) -> Expr:
        order: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        moved = list(at)
        for position, source in enumerate(order):
            moved[source % len(at)] = at[position]
        return self.lift(node.args[0], scope, tuple(moved))

    def _view(self, node: Node, scope: Scope, at: Indices) -> Expr:
        """Reshapes that only insert or drop dimensions of size 1."""
        source = node.args[0]
        if not isinstance(source, Node):
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
        if not isinstance(source, Node):
            return self._leaf(node, scope, at)
        if any(_is_tensor(k) or k in self.inputs for k in key if isinstance(k, Node)):
            return self._gather(node, source, key, scope, at)
        rank = len(shape_of(source))
        own = list(at)
        indices: list[Expr] = []
        for item in _expand_ellipsis(key, rank):
            if item is None:
                own.pop(0)
            elif isinstance(item, slice):
                index = own.pop(0)
                if item.step not in (None, 1) or _is_negative(item.start):
                    return self._leaf(node, scope, at)
                shift = item.start not in (None, 0)
                indices.append(Apply("add", (index, self.lift(item.start, scope, ()))) if shift else index)
            elif isinstance(item, int) and item >= 0:
                indices.append(Const(item))
            else:
                return self._leaf(node, scope, at)
        return self.lift(source, scope, tuple(indices) + tuple(own))

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


def _is_negative(start: Any) -> bool:
    return isinstance(start, int) and start < 0


def _expand_ellipsis(key: Sequence[Any], rank: int) -> list[Any]:
    used = sum(1 for k in key if k is not None and k is not Ellipsis)
    items: list[Any] = []
    for item in key:
        items += [slice(None)] * (rank - used) if item is Ellipsis else [item]
    return items

"""What every lifting rule needs: operands at the result's position, and leaves."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from omnisparse_flex.masks.expr.expr import Const, Expr, Load, axes
from omnisparse_flex.passes.nodes import shape_of, value_of
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Leaf
from omnisparse_flex.passes.writes import mutations

Indices = tuple[Expr, ...]


class LiftError(Exception):
    """The mask is not a function of indices and small tensors; the text says why."""


class Reader(abc.ABC):
    """Values of one site's mask as expressions; small tensors that it meets become leaves."""

    def __init__(
        self,
        leaves: list[Leaf],
        inputs: dict[Node, Expr] | None = None,
        outer: dict[Node, Leaf] | None = None,
        reader: Node | None = None,
    ) -> None:
        """Start a lift.

        Args:
            leaves: Filled with what the expression reads; slot i is ``leaves[i]``.
            inputs: Ready expressions of some nodes (the index inputs of a mask graph).
            outer: Nodes that stand for a tensor of another graph (a mask graph's operands).
            reader: The node that reads the lifted value: what is written to it later does not matter.
        """
        self.leaves = leaves
        self.inputs = inputs or {}
        self.outer = outer or {}
        self.reader: Node | None = reader
        self.detached = False

    @abc.abstractmethod
    def lift(self, node: Any, scope: Scope, at: Indices) -> Expr:
        """The value of ``node`` at position ``at``; see ``Lifter.lift``."""

    def _leaf(self, node: Node, scope: Scope, at: Indices) -> Expr:
        queries = [i for i, e in enumerate(at) if "q" in axes(e)]
        keys = [i for i, e in enumerate(at) if "kv" in axes(e)]
        if any(i != j for i in queries for j in keys):
            shape = tuple(shape_of(node))
            raise LiftError(f"mask {node.name} {shape} is a query-by-key tensor, not a function of indices")
        leaf = self.outer.get(node, Leaf(node, scope))
        if self.detached and _learns(leaf.node):
            leaf = dataclasses.replace(leaf, detached=True)
        value = value_of(leaf.node)
        if isinstance(value, (bool, int, float)):
            return Const(value)
        if not isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat)):
            raise LiftError(f"mask {node.name} is neither a tensor nor a number")
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        return Load(self.leaves.index(leaf), at)

    def _operand(self, arg: Any, scope: Scope, at: Indices) -> Expr:
        """An operand at the result's position: dimensions align right, size 1 broadcasts."""
        if not isinstance(arg, Node) or arg in self.inputs:
            return self.lift(arg, scope, ())
        shape = shape_of(arg)
        own = at[len(at) - len(shape) :] if shape else ()
        return self.lift(arg, scope, _collapse(own, shape))

    def _captured(self, source: Node, scope: Scope, at: Indices) -> Expr:
        """An element of a small tensor, read where it was computed."""
        while source.op == "placeholder" and source not in self.outer and scope.parent is not None:
            outer = scope.operand_of(source)
            if outer is None:
                break
            source, scope = outer, scope.parent
        if mutations(source):
            raise LiftError(f"mask {source.name} is changed in place")
        return self._leaf(source, scope, at)


def _learns(node: Node | None) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _collapse(at: Indices, shape: Sequence[Any]) -> Indices:
    return tuple(Const(0) if is_one(size) else index for index, size in zip(at, shape, strict=True))


def is_one(size: Any) -> bool:
    """Whether a size is the number 1, without adding a guard."""
    return isinstance(size, int) and size == 1

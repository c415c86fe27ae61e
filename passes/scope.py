"""A captured graph among those that hold it, and how a tensor of one is read in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from torch.fx import GraphModule, Node

from omnisparse_flex.errors import PassError


@dataclasses.dataclass(eq=False)
class Scope:
    """A graph, and for a sub-graph (an activation-checkpoint body) the call that runs it.

    Attributes:
        graph_module: The graph.
        parent: The scope that holds ``call``; None for the outermost graph.
        call: The higher-order call; its operands are ``call.args[1:]``.
        carried: Inputs that ``carry`` added, by the enclosing graph's node.
        made: Nodes that ``lower`` made for what sites read, by what they are made of.
    """

    graph_module: GraphModule
    parent: Scope | None = None
    call: Node | None = None
    carried: dict[Node, Node] = dataclasses.field(default_factory=dict)
    made: dict[Hashable, Node] = dataclasses.field(default_factory=dict)

    def placeholders(self) -> list[Node]:
        """This graph's inputs, in order."""
        return self.graph_module.graph.find_nodes(op="placeholder", sort=True)

    def operand_of(self, placeholder: Node) -> Node | None:
        """The parent's node that feeds ``placeholder``, if this is a sub-graph."""
        if self.parent is None or self.call is None:
            return None
        position = self.placeholders().index(placeholder)
        operand = self.call.args[1 + position]
        return operand if isinstance(operand, Node) else None

    def carry(self, node: Node, home: Scope) -> Node:
        """Make a node of an enclosing scope readable here, through new sub-graph inputs."""
        if home is self:
            return node
        if node in self.carried:
            return self.carried[node]
        if self.parent is None or self.call is None:
            raise PassError(f"{node.name} is not in an enclosing graph")
        outer = self.parent.carry(node, home)
        graph = self.graph_module.graph
        inputs = self.placeholders()
        with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(next(iter(graph.nodes))):
            inner = graph.placeholder(f"omnisparse_{outer.name}")
        inner.meta = dict(outer.meta)
        self.call.args = (*self.call.args, outer)
        self.carried[node] = inner
        return inner

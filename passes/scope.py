"""A captured graph among those that hold it, and how a tensor of one is read in another."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable

from torch.fx import GraphModule, Node

from omnisparse_flex.errors import PassError
from omnisparse_flex.passes.nodes import value_of


@dataclasses.dataclass(eq=False)
class Scope:
    """A graph, and for a sub-graph (an activation-checkpoint body) the call that runs it.

    Attributes:
        graph_module: The graph.
        parent: The scope that holds ``call``; None for the outermost graph.
        call: The higher-order call; its operands are ``call.args[1:]``.
        carried: Inputs that ``carry`` added, by the enclosing graph's node.
        made: Nodes that ``lower`` made for what sites read, by what they are made of.
        handed: The parent's nodes for outputs that ``hand_out`` added, by this graph's node.
    """

    graph_module: GraphModule
    parent: Scope | None = None
    call: Node | None = None
    carried: dict[Node, Node] = dataclasses.field(default_factory=dict)
    made: dict[Hashable, Node] = dataclasses.field(default_factory=dict)
    handed: dict[Node, Node] = dataclasses.field(default_factory=dict)

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

    def hand_out(self, node: Node) -> Node:
        """Make a tensor of this sub-graph readable in the parent, through a new output; earlier ones keep their places.

        Autograd takes the new output for one of the body's results: hand out what has no gradient.
        """
        if node in self.handed:
            return self.handed[node]
        if self.parent is None or self.call is None:
            raise PassError(f"{node.name} is in no sub-graph")
        output = self.graph_module.graph.output_node()
        results = output.args[0]
        assert isinstance(results, tuple), "Dynamo flattens what a body returns"
        output.args = ((*results, node),)
        graph = self.parent.graph_module.graph
        with graph.inserting_after(self.call):
            outer = graph.create_node("call_function", operator.getitem, (self.call, len(results)), name=node.name)
        for name in ("example_value", "val"):
            values = self.call.meta.get(name)
            if isinstance(values, (tuple, list)):
                outer.meta[name] = value_of(node)
                self.call.meta[name] = (*values, value_of(node))
        self.handed[node] = outer
        return outer

    def reach(self, node: Node, home: Scope) -> Node:
        """Make a tensor of any graph readable here: out of the sub-graphs that hold it, and into this one.

        The calls on the way must run ``node`` before what reads it here.
        """
        around, scope = [self], self
        while scope.parent is not None:
            scope = scope.parent
            around.append(scope)
        while home not in around:
            assert home.parent is not None, f"{node.name} and its reader have no graph in common"
            node, home = home.hand_out(node), home.parent
        return self.carry(node, home)

"""Copies of a captured graph and its sub-graphs, to which they can be brought back."""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule

from omnisparse_flex.passes.find_sites import scopes_of
from omnisparse_flex.passes.scope import Scope


class Snapshot:
    """A graph as it was. A copy shares no node with it; values recorded for nodes are shared."""

    def __init__(self, graph_module: GraphModule) -> None:
        """Copy every graph that a pass may change."""
        self.graphs = [(module, _copied(module.graph)) for module in _modules(graph_module)]

    def restore(self) -> None:
        """Bring the graphs back; the snapshot can be used again."""
        for module, graph in self.graphs:
            module.graph = _copied(graph)


def _modules(graph_module: GraphModule) -> list[GraphModule]:
    """The graph and the bodies that it calls, each once."""
    return list({id(x.graph_module): x.graph_module for x in scopes_of(Scope(graph_module))}.values())


def _copied(graph: Graph) -> Graph:
    made: Graph = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, made.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):  # what the compiler asks every input for
            new._dynamo_source = old._dynamo_source
    return made

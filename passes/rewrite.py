"""The state that one run of the pipeline shares: scopes, sites, settings and reasons."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.cost import Shape
from omnisparse_flex.errors import PassError
from omnisparse_flex.masks.expr import TRUE, Expr
from omnisparse_flex.passes.nodes import value_of


@dataclasses.dataclass(eq=False)
class Scope:
    """A graph, and for a sub-graph (an activation-checkpoint body) the call that runs it.

    Attributes:
        graph_module: The graph.
        parent: The scope that holds ``call``; None for the outermost graph.
        call: The higher-order call; its operands are ``call.args[1:]``.
        carried: Inputs that ``carry`` added, by the enclosing graph's node.
        handed: The parent's nodes for outputs that ``hand_out`` added, by this graph's node.
    """

    graph_module: GraphModule
    parent: Scope | None = None
    call: Node | None = None
    carried: dict[Node, Node] = dataclasses.field(default_factory=dict)
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


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    """Why a site stays dense; a fact for the report, never an exception."""

    reason: str
    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A small tensor (or size) that a lifted mask reads.

    Attributes:
        node: Its node; None stands for S - L, which the lowered call reads off its operands.
        home: The graph that holds ``node``.
    """

    node: Node | None
    home: Scope


@dataclasses.dataclass(eq=False)
class Site:
    """One attention site, from match to rewrite.

    Attributes:
        kind: ``marker``, ``sdpa``, ``flex`` or ``eager``.
        scope: The graph it was found in.
        node: The node whose value is the attention output, (B, Hq, L, Dv).
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D); before ``undo_repeat_kv`` possibly repeated to Hq heads.
        value: (B, Hkv, S, Dv).
        mask: bool or additive mask node, or None.
        mask_blocks: A bool ``mask`` says where attention is *not* allowed.
        padding: bool (B, S) node, or None.
        causal: ``"none"``, ``"upper_left"`` (SDPA) or ``"lower_right"`` (decoders with a cache).
        scale: Logit scale, None: 1 / sqrt(D).
        softcap: 0: none.
        sinks: (Hq,) node, logit of each head's virtual key without a value, or None.
        dropout: Probability.
        layer: Decoder layer, 0-based; order of appearance where the model does not say.
        path: Module path, for the report.
        mods: A flex site's ``(score graph, mask graph, score operands, mask operands)``.
        expr: The lifted mask.
        bias: The lifted additive part, or None.
        leaves: What ``expr`` reads, by slot.
        bias_leaves: What ``bias`` reads, by slot.
        offset: Expression of query 0's position.
        skip: Set by the first pass that refuses the site.
        rewritten: Set when ``lower`` has replaced the site.
        flash_refused: Why a wanted FLASH kernel does not run it, "" otherwise.
        lead: The site whose choice of blocks it uses, None: its own.
        alone: Why it could not use the choice of the sites before it, "" where it does or need not.
    """

    kind: str
    scope: Scope
    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    mask_blocks: bool = False
    padding: Node | None = None
    causal: str = "none"
    scale: float | None = None
    softcap: float = 0.0
    sinks: Node | None = None
    dropout: float = 0.0
    layer: int = -1
    path: str = ""
    mods: tuple[GraphModule, GraphModule, tuple[Any, ...], tuple[Any, ...]] | None = None
    expr: Expr = TRUE
    bias: Expr | None = None
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    bias_leaves: list[Leaf] = dataclasses.field(default_factory=list)
    offset: Expr | None = None
    skip: Skip | None = None
    rewritten: bool = False
    flash_refused: str = ""
    lead: Site | None = None
    alone: str = ""

    def refuse(self, reason: str) -> None:
        """Leave the site dense; the first reason stands."""
        if self.skip is None:
            self.skip = Skip(reason, self.node)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to rewrite; fixed for one backend object.

    Attributes:
        config: Selection rules.
        least: Queries below which a site with these heads stays dense; 0 switches every fallback off.
        lists: The inner compiler honours block lists (Inductor).
        kernel: ``"auto"``, ``"triton"`` or ``"flash"``; see ``kernel_choice``.
        static: Every graph is of one length (``dynamic=False``).
    """

    config: OmniSparseConfig
    least: Callable[[Shape], int] = lambda shape: 0
    lists: bool = True
    kernel: str = "triton"
    static: bool = False


@dataclasses.dataclass(eq=False)
class Rewrite:
    """One run of the pipeline over one captured graph.

    Attributes:
        root: The outermost graph.
        settings: How to rewrite.
        scopes: ``root`` and its sub-graphs, parents first.
        sites: What was found, in graph order.
        state: Operands of the ``bind`` op (visual, recall, stats, maps, recalls), if there is one.
        orphans: Nodes whose readers a pass removed; the clean-up erases the dead ones.
        modified: Whether any graph changed.
    """

    root: Scope
    settings: Settings
    scopes: list[Scope] = dataclasses.field(default_factory=list)
    sites: list[Site] = dataclasses.field(default_factory=list)
    state: tuple[Node | None, ...] = (None, None, None, None, None)
    orphans: list[Leaf] = dataclasses.field(default_factory=list)
    modified: bool = False

    def open_sites(self) -> list[Site]:
        """Sites that no pass has refused."""
        return [site for site in self.sites if site.skip is None]

    def moved(self, old: Node, new: Node) -> None:
        """Let sites that attend over another site's output (no projection in between) follow its rewrite."""
        for site in self.sites:
            site.query, site.key, site.value = (new if x is old else x for x in (site.query, site.key, site.value))

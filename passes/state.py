"""The state that one run of the pipeline shares: sites, settings and reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.cost_model import Shape
from omnisparse_flex.masks.expr.expr import TRUE, Expr
from omnisparse_flex.passes.scope import Scope


@dataclasses.dataclass(frozen=True, slots=True)
class Skip:
    """Why a site stays dense; a fact for the report, never an exception."""

    reason: str
    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """Block lists beside their counts.

    Attributes:
        indices: int (B, H, NQ, W).
        kv_len: Number of keys, an int or its node.
        block: Keys of a block.
    """

    indices: Node
    kv_len: Node | int
    block: int


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A small tensor (or size) that a lifted mask reads.

    Attributes:
        node: Its node; None stands for S - L, which the lowered call reads off its operands.
        home: The graph that holds ``node``.
        detached: The model has no gradient through it here, though it may require one.
        listed: What else belongs to block lists whose counts ``node`` are: the tensor is the map that they stand for.
    """

    node: Node | None
    home: Scope
    detached: bool = False
    listed: Listed | None = None


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
        mask_reader: The node that reads ``mask``; None: ``node``.
        reads: What the site reads elsewhere than at ``node``, and the nodes that read it: (value, reader).
        padding: bool (B, S) node, or None.
        causal: ``"none"``, ``"upper_left"`` (SDPA) or ``"lower_right"`` (decoders with a cache).
        scale: Logit scale, None: 1 / sqrt(D).
        softcap: 0: none.
        sinks: (Hq,) node, logit of each head's virtual key without a value, or None.
        state: What it reads of the call's state (visual, recall, records to write); empty: nothing reaches it.
        dropout: Probability.
        layer: Decoder layer, 0-based; order of appearance where the model does not say.
        path: Module path, for the report.
        mods: A flex site's ``(score graph, mask graph, score operands, mask operands)``.
        lists: A flex site's block mask as the operator takes it, its mask graph last.
        expr: The lifted mask.
        bias: The lifted additive part, or None.
        leaves: What ``expr`` reads, by slot.
        bias_leaves: What ``bias`` reads, by slot.
        offset: Expression of query 0's position.
        skip: Set by the first pass that refuses the site.
        rewritten: Set when ``lower`` has replaced the site.
        flash_refused: Why a wanted FLASH kernel does not run it, "" otherwise.
    """

    kind: str
    scope: Scope
    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    mask_blocks: bool = False
    mask_reader: Node | None = None
    reads: tuple[tuple[Node, Node], ...] = ()
    padding: Node | None = None
    causal: str = "none"
    scale: float | None = None
    softcap: float = 0.0
    sinks: Node | None = None
    state: tuple[Leaf | None, ...] = ()
    dropout: float = 0.0
    layer: int = -1
    path: str = ""
    mods: tuple[GraphModule, GraphModule, tuple[Any, ...], tuple[Any, ...]] | None = None
    lists: tuple[Any, ...] = ()
    expr: Expr = TRUE
    bias: Expr | None = None
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    bias_leaves: list[Leaf] = dataclasses.field(default_factory=list)
    offset: Expr | None = None
    skip: Skip | None = None
    rewritten: bool = False
    flash_refused: str = ""

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
        traced: Gradients are traced and not compiled (aot_eager).
        static: Every graph is of one length (``dynamic=False``).
        stateful: Calls have run-time state: a site that it does not reach must stay dense.
        training: A backward follows.
    """

    config: OmniSparseConfig
    least: Callable[[Shape], int] = lambda shape: 0
    lists: bool = True
    kernel: str = "triton"
    static: bool = False
    traced: bool = False
    stateful: bool = False
    training: bool = False


@dataclasses.dataclass(eq=False)
class Rewrite:
    """One run of the pipeline over one captured graph.

    Attributes:
        root: The outermost graph.
        settings: How to rewrite.
        scopes: ``root`` and its sub-graphs, parents first.
        sites: What was found, in graph order.
        orphans: Nodes whose readers a pass removed; the clean-up erases the dead ones.
        modified: Whether any graph changed.
        refused: Reasons of sites that are to stay dense whatever the passes find, by their place in ``sites``.
        visited: The site that a pass works on, or None.
        dumped_to: The folder of this run's dump, if one was asked for.
    """

    root: Scope
    settings: Settings
    scopes: list[Scope] = dataclasses.field(default_factory=list)
    sites: list[Site] = dataclasses.field(default_factory=list)
    orphans: list[Leaf] = dataclasses.field(default_factory=list)
    modified: bool = False
    refused: Mapping[int, str] = dataclasses.field(default_factory=dict)
    visited: Site | None = None
    dumped_to: str | None = None

    def open_sites(self) -> list[Site]:
        """Sites that no pass has refused."""
        return [site for site in self.sites if site.skip is None]

    def visit(self, sites: Iterable[Site]) -> Iterator[Site]:
        """The sites one by one, each ``visited`` while it is worked on: what fails then is its own failure."""
        for self.visited in sites:
            assert self.visited is not None
            yield self.visited
        self.visited = None

    def moved(self, old: Node, new: Node) -> None:
        """Let sites that attend over another site's output (no projection in between) follow its rewrite."""
        for site in self.sites:
            site.query, site.key, site.value = (new if x is old else x for x in (site.query, site.key, site.value))

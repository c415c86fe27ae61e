"""Facts about FX graphs that the tests of a pass rely on; public through ``omnisparse_flex.testing``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree


def count_hops(gm: GraphModule) -> int:
    """Number of FlexAttention calls that one run of ``gm`` makes.

    Args:
        gm: A graph from Dynamo or AOTAutograd; bodies of higher-order ops (activation
            checkpointing, ``cond``) count once for each call of theirs.

    Returns:
        Calls of the forward ``flex_attention`` higher-order op.
    """
    flex = torch.ops.higher_order.flex_attention
    return sum(
        calls * sum(node.op == "call_function" and node.target is flex for node in graph_module.graph.nodes)
        for graph_module, calls in _reached(gm)
    )


def assert_no_square(gm: GraphModule, length: int) -> None:
    """Check that no value in ``gm`` or its sub-graphs is quadratic in the sequence length.

    Args:
        gm: A graph whose nodes carry ``meta["example_value"]`` or ``meta["val"]``.
        length: Sequence length of the example inputs, in tokens; one that no other
            dimension has. A symbolic dimension counts by its hint.

    Raises:
        AssertionError: Naming each node with ``length`` twice in its shape; or if no
            node carries a tensor, since nothing would have been checked.
    """
    squares: list[str] = []
    checked = 0
    for graph_module, _ in _reached(gm):
        for node in graph_module.graph.nodes:
            for shape in _shapes(node):
                checked += 1
                if Counter(_hint(dim) for dim in shape)[length] >= 2:
                    squares.append(f"{node.format_node()} has shape {shape}")
    if squares:
        raise AssertionError(f"{len(squares)} values hold {length} x {length} elements:\n" + "\n".join(squares))
    if not checked:
        raise AssertionError("no node carries a tensor in meta['example_value'] or meta['val']: nothing was checked")


def _reached(gm: GraphModule, calls: int = 1) -> Iterator[tuple[GraphModule, int]]:
    """``gm`` and the sub-graphs it runs, each with its number of calls; orphaned sub-modules are left out."""
    yield gm, calls
    for node in gm.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        child: object = gm
        for part in str(node.target).split("."):
            child = getattr(child, part)
        uses = len(node.users) if node.op == "get_attr" else 1
        if isinstance(child, GraphModule) and uses:
            yield from _reached(child, calls * uses)


def _shapes(node: Node) -> Iterator[tuple[int | torch.SymInt, ...]]:
    values = (node.meta.get("example_value"), node.meta.get("val"))
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield tuple(leaf.shape)


def _hint(dim: int | torch.SymInt) -> int | None:
    # int(dim) would add a guard to the graph under test.
    if not isinstance(dim, torch.SymInt):
        return dim
    return dim.node.hint if dim.node.has_hint() else None

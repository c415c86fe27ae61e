"""Pass 6: drop what nothing reads any more, above all the N x N mask.

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    layout = omnisparse_layout(q, k, window)
    sparse = omnisparse_layer_0(q, k, v, layout, window)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return sparse
    # site sparse: query=q, key=k, value=v, mask=lt(sub(q, kv), window), rewritten

After::

    layout = omnisparse_layout(q, k, window)
    sparse = omnisparse_layer_0(q, k, v, layout, window)
    return sparse
    # site sparse: query=q, key=k, value=v, mask=lt(sub(q, kv), window), rewritten
"""

from __future__ import annotations

from torch.fx import Node

from omnisparse_flex.passes.find_sites import BINDS, STATE_FROM
from omnisparse_flex.passes.scope import Scope
from omnisparse_flex.passes.state import Rewrite
from omnisparse_flex.passes.writes import writes


def clean_up(rewrite: Rewrite) -> None:
    """Erase replaced sites with whatever fed only them, the bind node and unused sub-graph inputs.

    Only nodes that a pass orphaned are looked at: a graph may rely on calls without readers
    that we know nothing about.
    """
    for node in rewrite.root.graph_module.graph.nodes:
        if node.op == "call_function" and node.target in BINDS and not node.users:
            rewrite.root.graph_module.graph.erase_node(node)
            rewrite.modified = True
    for site in rewrite.sites:
        if site.kind == "marker" and not site.rewritten and site.state:
            # A dense site reads no state: a decode step that did would never be the same twice.
            site.node.args, site.state = site.node.args[:STATE_FROM], None
            rewrite.modified = True
    if not rewrite.modified:
        return
    orphans = {leaf.home: [] for leaf in rewrite.orphans}  # type: dict[Scope, list[Node]]
    for leaf in rewrite.orphans:
        assert leaf.node is not None
        orphans[leaf.home].append(leaf.node)
    for scope in reversed(rewrite.scopes):
        _erase_dead(scope, orphans.get(scope, []))
        if scope.parent is not None:
            orphans.setdefault(scope.parent, []).extend(_drop_unused_inputs(scope))
        scope.graph_module.graph.lint()
        scope.graph_module.recompile()


def _erase_dead(scope: Scope, candidates: list[Node]) -> None:
    """Erase candidates that nothing reads, and then what fed them."""
    erased: set[Node] = set()
    while candidates:
        node = candidates.pop()
        if node in erased or node.users or not _is_pure(node):
            continue
        candidates.extend(node.all_input_nodes)
        scope.graph_module.graph.erase_node(node)
        erased.add(node)


def _drop_unused_inputs(scope: Scope) -> list[Node]:
    """Remove a body's unread inputs; a mask stays alive in the parent until its operand goes."""
    call = scope.call
    assert call is not None
    body, *operands = call.args
    kept, dropped = [], []
    for placeholder, operand in zip(scope.placeholders(), operands, strict=True):
        if placeholder.users:
            kept.append(operand)
            continue
        scope.graph_module.graph.erase_node(placeholder)
        dropped += [operand] if isinstance(operand, Node) else []
    call.args = (body, *kept)
    return dropped


def _is_pure(node: Node) -> bool:
    """Whether an unread node may go; in-place spellings of Dynamo graphs are not in FX's own list."""
    if node.op in ("placeholder", "output"):
        return False
    return not writes(node) and not node.is_impure()

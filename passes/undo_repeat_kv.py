"""Pass 2: keys and values repeated to the query's heads go back to their own (GQA)."""

from __future__ import annotations

from torch.fx import Node

from omnisparse_flex.passes.nodes import op_name, shape_of
from omnisparse_flex.passes.state import Rewrite


def undo_repeat_kv(rewrite: Rewrite) -> None:
    """Point each site at the un-repeated key and value; the copies die in the clean-up.

    ``expand -> reshape`` (transformers) and ``repeat_interleave`` (everybody else) order
    repeated heads alike: head h of the copy is head h // n of the original.
    """
    for site in rewrite.open_sites():
        key, value = _source(site.key), _source(site.value)
        if key is not None and value is not None and shape_of(key)[1] == shape_of(value)[1]:
            site.key, site.value = key, value


def _source(node: Node) -> Node | None:
    """The (B, Hkv, S, D) node that ``node`` repeats head-wise, or None."""
    if len(shape_of(node)) != 4:
        return None
    if op_name(node) == "repeat_interleave":
        source = node.args[0]
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        return source if isinstance(source, Node) and dim in (1, -3) and len(shape_of(source)) == 4 else None
    if op_name(node) == "contiguous":
        return _source(node.args[0]) if isinstance(node.args[0], Node) else None
    if op_name(node) not in ("reshape", "view", "flatten"):
        return None
    expanded = node.args[0]
    if not isinstance(expanded, Node) or op_name(expanded) not in ("expand", "expand_as", "broadcast_to"):
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, Node) or len(shape_of(inserted)) != 5:
        return None
    source = inserted.args[0] if inserted.args else None
    if not isinstance(source, Node) or len(shape_of(source)) != 4:
        return None
    batch, heads, length, dim = shape_of(source)
    repeats = shape_of(expanded)[2]
    is_insert = shape_of(inserted) == (batch, heads, 1, length, dim)
    return source if is_insert and shape_of(node) == (batch, heads * repeats, length, dim) else None

"""Pass 2: keys and values repeated to the query's heads go back to their own (GQA).

Before::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=keys, value=values, mask=mask

After::

    at = arange(256)
    getitem = getitem(at, (:, None))
    sub = sub(getitem, at)
    mask = lt(sub, window)
    keys = repeat_interleave(k, 2, 1)
    values = repeat_interleave(v, 2, 1)
    dense = scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return dense
    # site dense: query=q, key=k, value=v, mask=mask
"""

from __future__ import annotations

from torch.fx import Node

from omnisparse_flex.passes.arguments import arguments, is_plain
from omnisparse_flex.passes.nodes import number_of, op_name, shape_of
from omnisparse_flex.passes.state import Rewrite
from omnisparse_flex.passes.writes import changes_between

_ALL = slice(None)


def undo_repeat_kv(rewrite: Rewrite) -> None:
    """Point each site at the un-repeated key and value; the copies die in the clean-up.

    ``expand -> reshape`` (transformers) and ``repeat_interleave`` (everybody else) order
    repeated heads alike: head h of the copy is head h // n of the original.
    """
    for site in rewrite.visit(rewrite.open_sites()):
        key, value = _source(site.key), _source(site.value)
        if key is None or value is None or shape_of(key)[1] != shape_of(value)[1]:
            continue
        # The copies were made before; what they are of may have been written to since.
        if not any(changes_between(new, old, site.node) for new, old in ((key, site.key), (value, site.value))):
            site.key, site.value = key, value


def _source(node: Node) -> Node | None:
    """The (B, Hkv, S, D) node that ``node`` repeats head-wise, or None."""
    if len(shape_of(node)) != 4:
        return None
    if op_name(node) == "repeat_interleave":
        return _interleaved(node)
    if op_name(node) == "contiguous":
        return _source(node.args[0]) if isinstance(node.args[0], Node) else None
    if op_name(node) not in ("reshape", "view", "flatten") or not is_plain(node, "shape", "start_dim", "end_dim"):
        return None
    expanded = node.args[0]
    if not isinstance(expanded, Node) or op_name(expanded) not in ("expand", "expand_as", "broadcast_to"):
        return None
    inserted = expanded.args[0]
    if not isinstance(inserted, Node) or op_name(inserted) not in ("getitem", "unsqueeze", "view", "reshape"):
        return None
    source = inserted.args[0] if inserted.args else None
    if not isinstance(source, Node) or len(shape_of(source)) != 4 or not _inserts(inserted):
        return None
    batch, heads, length, dim = shape_of(source)
    repeats = shape_of(expanded)[2]
    is_insert = shape_of(inserted) == (batch, heads, 1, length, dim)
    is_repeat = shape_of(expanded) == (batch, heads, repeats, length, dim)
    return source if is_insert and is_repeat and shape_of(node) == (batch, heads * repeats, length, dim) else None


def _interleaved(node: Node) -> Node | None:
    """What ``repeat_interleave`` repeats, every head the same number of times."""
    operands = arguments(node, "input", "repeats", "dim")
    if operands is None or operands["dim"] not in (1, -3) or not isinstance(operands["input"], Node):
        return None
    often, shape = number_of(operands["repeats"]), shape_of(operands["input"])
    # A tensor of repeats has a number for each head, and its values are known at run time only.
    return operands["input"] if often is not None and len(shape) == 4 else None


def _inserts(node: Node) -> bool:
    """Whether ``node`` is its source with one more dimension at place 2 and nothing else changed."""
    if op_name(node) == "unsqueeze":
        operands = arguments(node, "input", "dim")
        return operands is not None and operands["dim"] in (2, -3)
    if op_name(node) in ("view", "reshape"):
        return is_plain(node, "shape", "size")  # the order of elements stays
    key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(k is not None and k is not Ellipsis and k != slice(None) for k in key):
        return False
    # x[:, :, None, ...] or x[..., None, :, :]
    return key.count(None) == 1 and (key[:3] == (_ALL, _ALL, None) or key[-3:] == (None, _ALL, _ALL))

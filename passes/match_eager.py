"""The matmul - softmax - matmul spelling of attention."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from omnisparse_flex.passes.nodes import number_of, op_name, shape_of

_MATMUL = ("matmul", "bmm")
_CASTS = ("to", "type_as", "float", "half", "bfloat16", "type")


def match_eager(node: Node) -> dict[str, Any] | None:
    """Match ``softmax(q @ k^T * scale + mask) @ v`` ending at ``node``.

    Every intermediate must have one reader: probabilities that somebody else reads cannot
    be fused away.

    Returns:
        Arguments for ``Site``, or None.
    """
    if op_name(node) not in _MATMUL or len(node.args) < 2 or len(shape_of(node)) != 4:
        return None
    weights, value = node.args[0], node.args[1]
    dropout = 0.0
    current = _through_casts(weights)
    if _is(current, "dropout"):
        given = dict(zip(("input", "p", "training"), current.args, strict=False)) | dict(current.kwargs)
        dropout = float(given.get("p", 0.5)) if given.get("training", True) else 0.0
        current = _through_casts(given["input"])
    if not _is(current, "softmax") or _dim_of(current) not in (-1, 3):
        return None
    current, mask, blocks = _split_mask(_through_casts(current.args[0]))
    current, scale = _split_scale(current)
    if not _is(current, *_MATMUL):
        return None
    query, transposed = current.args[:2]
    key = _untranspose(transposed)
    if key is None or not isinstance(query, Node) or not isinstance(value, Node):
        return None
    if len(shape_of(query)) != 4 or len(shape_of(value)) != 4:
        return None
    query, inner = _split_scale(query)
    return {
        "node": node,
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "mask_blocks": blocks,
        "scale": scale * inner,
        "dropout": dropout,
    }


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and op_name(node) in names and len(node.users) == 1


def _through_casts(node: Any) -> Any:
    while _is(node, *_CASTS):
        node = node.args[0]
    return node


def _dim_of(node: Node) -> Any:
    return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)


def _split_mask(node: Any) -> tuple[Any, Any, bool]:
    """``(logits, mask, mask blocks)`` of ``logits + mask`` or ``logits.masked_fill(~mask, -inf)``."""
    if _is(node, "add", "iadd"):
        for logits, mask in (node.args[:2], node.args[1::-1]):
            if _is(logits, *_MATMUL, "mul", "truediv", "div") and isinstance(mask, Node):
                return logits, mask, False
    if _is(node, "masked_fill") and isinstance(node.args[2], float) and node.args[2] <= -1e4:
        return node.args[0], node.args[1], True
    return node, None, False


def _split_scale(node: Any) -> tuple[Any, float]:
    """``(x, s)`` of ``x * s`` or ``x / (1 / s)`` with a number ``s``."""
    if _is(node, "mul", "truediv", "div") and len(node.args) == 2:
        x, factor = node.args
        number = number_of(factor)
        if number is not None and isinstance(x, Node):
            return x, number if op_name(node) == "mul" else 1.0 / number
    return node, 1.0


def _untranspose(node: Any) -> Node | None:
    """``k`` of ``k.transpose(-2, -1)``."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source, *dims = node.args
    name = op_name(node)
    swaps = name in ("transpose", "swapaxes") and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}
    order = dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims
    permutes = name == "permute" and tuple(order) == (0, 1, 3, 2)
    return source if swaps or permutes or (name == "getattr" and dims == ["mT"]) else None  # type: ignore[return-value]

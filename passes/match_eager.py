"""The matmul - softmax - matmul spelling of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from omnisparse_flex.passes.arguments import PARAMETERS, arguments, is_plain
from omnisparse_flex.passes.nodes import number_of, op_name, shape_of, value_of

_MATMUL = ("matmul", "bmm")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CASTS = ("to", "type_as", "float", "half", "bfloat16", "type")


def match_eager(node: Node) -> dict[str, Any] | None:
    """Match ``softmax(q @ k^T * scale + mask) @ v`` ending at ``node``.

    Every intermediate must have one reader: probabilities that somebody else reads cannot
    be fused away.

    Returns:
        Arguments for ``Site``, or None.
    """
    product = _matmul(node)
    if product is None or len(shape_of(node)) != 4:
        return None
    weights, value = product
    current, dropout = _split_dropout(_through_casts(weights))
    current = _softmax_of(_through_casts(current))
    if current is None:
        return None
    masked = _through_casts(current)
    current, mask, blocks = _split_mask(masked)
    current, scale = _split_scale(current)
    product = _matmul(current) if _is(current, *_MATMUL) else None
    if product is None:
        return None
    query, transposed = product
    key = _untranspose(transposed)
    if key is None or not isinstance(query, Node) or not isinstance(value, Node):
        return None
    if len(shape_of(query)) != 4 or len(shape_of(value)) != 4:
        return None
    scaled, (query, inner) = query, _split_scale(query)
    first = current
    return {
        "node": node,
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "mask_reader": None if mask is None else masked,
        # A view is read where it is multiplied, a scaled copy where it is made.
        "reads": ((query, first if scaled is query else scaled), (key, first)),
        "mask_blocks": blocks,
        "scale": scale * inner,
        "dropout": dropout,
    }


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and op_name(node) in names and len(node.users) == 1


def _matmul(node: Node) -> tuple[Any, Any] | None:
    """The two factors of a product."""
    operands = arguments(node, "input", "other") if op_name(node) == "matmul" else None
    operands = arguments(node, "input", "mat2") if op_name(node) == "bmm" else operands
    return None if operands is None else (operands["input"], operands.get("mat2", operands.get("other")))


def _through_casts(node: Any) -> Any:
    """What was cast to a type of numbers with a fraction; a cast to integers stays: it drops the fraction."""
    while _is(node, *_CASTS) and value_of(node).dtype in _FLOATS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _split_dropout(node: Any) -> tuple[Any, float]:
    """``(x, p)`` of ``dropout(x, p)``; a probability that nobody knows counts as certain, and so refuses the site."""
    operands = arguments(node, "input", "p", "training") if _is(node, "dropout") else None
    if operands is None:
        return node, 0.0
    if operands["training"] is False:
        return operands["input"], 0.0
    number = 0.5 if operands["p"] is None else number_of(operands["p"])
    return operands["input"], 1.0 if number is None else number


def _softmax_of(node: Any) -> Any:
    """``x`` of a softmax of ``x`` over the keys."""
    operands = arguments(node, "input", "dim", "dtype") if _is(node, "softmax") else None
    return operands["input"] if operands is not None and operands["dim"] in (-1, 3) else None


def _split_mask(node: Any) -> tuple[Any, Any, bool]:
    """``(logits, mask, mask blocks)`` of ``logits + mask`` or ``logits.masked_fill(~mask, -inf)``."""
    if _is(node, "add", "iadd") and (operands := arguments(node, "input", "other")) is not None:
        terms = operands["input"], operands["other"]
        for logits, mask in (terms, terms[::-1]):
            if _is(logits, *_MATMUL, "mul", "truediv", "div") and isinstance(mask, Node):
                return logits, mask, False
    if _is(node, "masked_fill") and (operands := arguments(node, "input", "mask", "value")) is not None:
        fill = operands["value"]
        if isinstance(fill, float) and fill <= -1e4 and isinstance(operands["mask"], Node):
            return operands["input"], operands["mask"], True
    return node, None, False


def _split_scale(node: Any) -> tuple[Any, float]:
    """``(x, s)`` of ``x * s`` or ``x / (1 / s)`` with a number ``s``."""
    if _is(node, "mul", "truediv", "div") and (operands := arguments(node, "input", "other")) is not None:
        x, number = operands["input"], number_of(operands["other"])
        if number is not None and isinstance(x, Node):
            return x, number if op_name(node) == "mul" else 1.0 / number
    return node, 1.0


def _untranspose(node: Any) -> Node | None:
    """``k`` of ``k.transpose(-2, -1)``."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source, *dims = node.args
    name = op_name(node)
    if name in ("transpose", "swapaxes"):
        operands = arguments(node, *PARAMETERS[name]) or {}
        swapped = [operands.get(x) for x in PARAMETERS[name][1:]]
        return source if all(isinstance(d, int) for d in swapped) and {d % 4 for d in swapped} == {2, 3} else None  # type: ignore[operator,return-value]
    order = dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims
    permutes = name == "permute" and tuple(order) in ((0, 1, 3, 2), (0, 1, -1, -2)) and is_plain(node)
    return source if permutes or (name == "getattr" and dims == ["mT"]) else None  # type: ignore[return-value]

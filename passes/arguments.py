"""What a call's arguments are called, so that no pass overlooks one: an argument nobody asked for is no match."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from omnisparse_flex.passes.nodes import op_name

_ONE, _TWO = ("input",), ("input", "other")
_UNARY = ("neg", "negative", "abs", "log", "exp", "sqrt", "tanh", "floor", "invert", "inv", "not", "bitwise_not")
_ARITHMETIC = ("mul", "multiply", "truediv", "div", "floordiv", "floor_divide", "mod", "remainder", "iadd", "matmul")
_COMPARISONS = ("le", "lt", "ge", "gt", "eq", "ne", "less", "greater", "less_equal", "greater_equal", "not_equal")
_LOGIC = tuple(f"{how}{what}" for how in ("", "bitwise_", "logical_") for what in ("and", "or", "xor"))

#: Parameters by operation, in positional order; see ``op_name``. Sizes (``view(2, 3)``) are not among them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_UNARY, "logical_not", "contiguous", "clone", "detach", "alias", "requires_grad_"), _ONE),
    **dict.fromkeys((*_ARITHMETIC, *_COMPARISONS, *_LOGIC, "minimum", "maximum", "min", "max"), _TWO),
    # A third argument by position is another signature: add(input, alpha, other).
    **dict.fromkeys(("add", "sub", "subtract"), _TWO),
    "bmm": ("input", "mat2"),
    "where": ("condition", "input", "other"),
    "pow": ("input", "exponent"),
    "softmax": ("input", "dim", "dtype"),
    "masked_fill": ("input", "mask", "value"),
    "transpose": ("input", "dim0", "dim1"),
    "swapaxes": ("input", "axis0", "axis1"),
    "unsqueeze": ("input", "dim"),
    "repeat_interleave": ("input", "repeats", "dim"),
    **dict.fromkeys(("tril", "triu"), ("input", "diagonal")),
    **dict.fromkeys(("clamp", "clip"), ("input", "min", "max")),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "full": ("size", "fill_value"),
    "full_like": ("input", "fill_value"),
    "new_full": ("input", "size", "fill_value"),
    "arange": ("start", "end", "step"),
    "expand_as": _TWO,
}
#: Functions whose parameters are not those of the method of their name.
OF_FUNCTION: dict[Any, tuple[str, ...]] = {
    F.softmax: ("input", "dim", "_stacklevel", "dtype"),
    F.dropout: ("input", "p", "training", "inplace"),
    torch.dropout: ("input", "p", "training"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
#: Other spellings of a parameter. torch.dropout's is "train".
_ALIASES = {"self": "input", "axis": "dim", "x": "input", "train": "training"}
#: Where and how a result lies in memory changes no number.
INERT = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy", "output_size", "_stacklevel")
#: Values with which an argument says nothing, beside None.
_DEFAULTS: dict[str, Any] = {
    "alpha": 1,
    "norm_type": 2.0,
    **dict.fromkeys(("inplace", "sparse", "scale_grad_by_freq", "requires_grad"), False),
}


def arguments(node: Node, *wanted: str) -> dict[str, Any] | None:
    """A call's arguments by name.

    Args:
        node: A call.
        *wanted: Parameters that the caller understands; those that are not given are None.

    Returns:
        All arguments; None if one is given that is not ``wanted`` and changes the result, or that nobody knows.
    """
    names = OF_FUNCTION.get(node.target) if callable(node.target) else None
    names = PARAMETERS.get(op_name(node)) if names is None else names
    if names is None or len(node.args) > len(names):
        return None
    operands: dict[str, Any] = dict.fromkeys(wanted)
    operands |= zip(names, node.args, strict=False)
    for name, value in node.kwargs.items():
        parameter = _ALIASES.get(name, name)
        if operands.get(parameter) is not None:
            return None
        operands[parameter] = value
    return operands if all(name in wanted or is_silent(name, value) for name, value in operands.items()) else None


def is_silent(name: str, value: Any) -> bool:
    """Whether an argument changes no number of the result."""
    if name in INERT or value is None:
        return True
    return not isinstance(value, Node) and name in _DEFAULTS and bool(value == _DEFAULTS[name])


def is_plain(node: Node, *wanted: str) -> bool:
    """Whether every keyword argument is ``wanted`` or silent: for calls that take sizes, in any number, by position."""
    return all(_ALIASES.get(name, name) in wanted or is_silent(name, value) for name, value in node.kwargs.items())

"""What a node tells of itself: the value recorded for it, its shape and dtype, its operation."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


def value_of(node: Any) -> Any:
    """The fake value that Dynamo (or AOTAutograd) recorded for a node."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value", node.meta.get("val"))
    return value


def dtype_of(node: Any) -> torch.dtype:
    """The dtype that a node's value has as a tensor; numbers count as those that they become."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return value.dtype
    return torch.float32 if isinstance(value, (float, torch.SymFloat)) else torch.int64


def shape_of(node: Node) -> tuple[Any, ...]:
    """A node's recorded shape, () if it has none."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are one number; where both are symbols a guard keeps what is found true of later calls."""
    if str(a) == str(b):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    try:
        return bool(a == b)
    except GuardOnDataDependentSymNode:  # known at run time only
        return False


def number_of(x: Any) -> float | None:
    """A number, or the number that a size computation stands for (which fixes it by a guard)."""
    value = value_of(x)
    return float(value) if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else None


def op_name(node: Node) -> str:
    """One vocabulary for ``operator.and_``, ``torch.bitwise_and``, ``Tensor.__and__`` and methods.

    A function of somebody else's has its module in its name, and so is none of them.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        name = str(getattr(packet, "__name__", packet))
        if not _is_torchs(packet):
            return f"{getattr(packet, '__module__', '')}.{name}"
    else:
        return node.op
    if name.startswith("__") and name.endswith("__"):
        return name.strip("_")
    return name[:-1] if name in ("and_", "or_", "not_") else name


def _is_torchs(function: Any) -> bool:
    """Whether a function is torch's or Python's; ``aten`` for operators: anybody may name one ``add``."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return str(function._qualified_op_name).startswith("aten::")
    module = getattr(function, "__module__", None) or "builtins"  # a method descriptor has none
    return module in ("torch", "_operator", "operator", "builtins") or module.startswith("torch.")

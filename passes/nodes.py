"""What a node tells of itself: the value recorded for it, its shape, its operation, and what changes it in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def value_of(node: Any) -> Any:
    """The fake value that Dynamo (or AOTAutograd) recorded for a node."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value", node.meta.get("val"))
    return value


def shape_of(node: Node) -> tuple[Any, ...]:
    """A node's recorded shape, () if it has none."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


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


_RESHAPES = ("view", "view_as", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "expand", "expand_as")
_OTHERS = ("getitem", "narrow", "select", "unbind", "transpose", "permute", "t", "mT", "getattr", "to", "contiguous")
#: Operations whose result may share memory with their first argument.
_VIEWS = frozenset((*_RESHAPES, *_OTHERS, "detach", "alias", "broadcast_to", "swapaxes", "type", "type_as", "float"))


def writes(node: Node) -> bool:
    """Whether ``node`` changes its first argument in place."""
    name = op_name(node)
    if node.op == "call_function":
        return name in ("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior") or name.endswith("_")
    return node.op == "call_method" and name.endswith("_")


def mutations(node: Node) -> list[Node]:
    """Nodes of the graph that change the value of ``node`` in place after it was made, also through views."""
    base = node
    while (writes(base) or op_name(base) in _VIEWS) and base.args and isinstance(base.args[0], Node):
        base = base.args[0]
    found, aliases = [], [base]
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            if user.args and user.args[0] is alias and (writes(user) or op_name(user) in _VIEWS):
                aliases.append(user)
                found += [user] if writes(user) and node < user else []
    return found

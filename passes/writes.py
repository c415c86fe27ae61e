"""What is changed in place, and when: the one rule by which every pass may read a tensor at another time.

A value that the model reads at one node may be read at another only if nothing writes to its memory between the two,
be it through the tensor, a view of it or what it is a view of. Tensors that share memory are known by the storage that
Dynamo recorded for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

from omnisparse_flex.passes.nodes import op_name, value_of

_IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_IN_PLACE_SHIFTS = ("ilshift", "irshift", "imatmul", "iconcat")
#: Not of the numbers.
_HARMLESS = ("requires_grad_", "share_memory_", "pin_memory_")

_WRITERS: weakref.WeakKeyDictionary[Graph, list[tuple[Node, frozenset[int]]]] = weakref.WeakKeyDictionary()


def mutations(node: Node) -> list[Node]:
    """Nodes of the graph that write to the memory of ``node`` after it was made, in order."""
    storage = _storages(node)
    return [writer for writer, written in _writers(node.graph) if node < writer and storage & written]


def changes_between(value: Node, reader: Node, later: Node) -> bool:
    """Whether what ``reader`` reads of ``value`` may be another value where ``later`` stands.

    Args:
        value: The value.
        reader: A node of the same graph that reads it, or makes a copy of what is wanted of it.
        later: A node of the same graph after ``reader``.
    """
    storage = _storages(value)
    return any(reader < w < later and storage & written for w, written in _writers(value.graph))


def writes(node: Node) -> bool:
    """Whether ``node`` changes memory that another node made."""
    return any(True for _ in _written(node))


def _writers(graph: Graph) -> list[tuple[Node, frozenset[int]]]:
    """The nodes that write, and the storages that they write to; passes add none and remove none."""
    if graph not in _WRITERS:
        found = ((node, _storages(*_written(node))) for node in graph.nodes)
        _WRITERS[graph] = [(node, written) for node, written in found if written]
    return _WRITERS[graph]


def _written(node: Node) -> Iterator[Node]:
    """The operands that a node changes."""
    if node.op not in ("call_function", "call_method"):
        return
    name = op_name(node).rpartition(".")[2] or op_name(node)
    if name in _HARMLESS:
        return
    if name in (*_IN_PLACE, *_IN_PLACE_SHIFTS) or (name.endswith("_") and not name.endswith("__")):
        yield from _nodes(node.args[:1])  # of torch._foreach_add_: a list
    if "out" in node.kwargs:
        yield from _nodes(node.kwargs["out"])
    if node.kwargs.get("inplace") is True:
        yield from _nodes(node.args[:1] or node.kwargs.get("input"))
    yield from _written_by_schema(node)
    yield from _written_in_body(node)


def _written_by_schema(node: Node) -> Iterator[Node]:
    """What a registered operator says that it changes."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    else:
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    for overload in overloads:
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(node.args[place : place + 1] or node.kwargs.get(argument.name))


def _written_in_body(node: Node) -> Iterator[Node]:
    """What the body of a higher-order call changes of its operands."""
    body = node.args[0] if node.args else None
    if not isinstance(body, Node) or body.op != "get_attr":
        return
    module = getattr(node.graph.owning_module, str(body.target), None)
    if not isinstance(module, GraphModule):
        return
    written = frozenset[int]().union(*(storages for _, storages in _writers(module.graph)))
    inputs = module.graph.find_nodes(op="placeholder", sort=True)
    for placeholder, operand in zip(inputs, node.args[1:], strict=False):
        if isinstance(operand, Node) and _storages(placeholder) & written:
            yield operand


def _nodes(value: Any) -> list[Node]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Node)]


def _storages(*nodes: Node) -> frozenset[int]:
    """The memory of the nodes' values, by what identifies it while they live."""
    tensors = [x for node in nodes for x in pytree.tree_leaves(value_of(node)) if isinstance(x, torch.Tensor)]
    return frozenset(_identity(x) for x in tensors)


def _identity(x: torch.Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return id(x)

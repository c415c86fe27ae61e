"""Tensors that a user's ``score_mod`` closes over, as arguments: only so do they get a gradient from the operator."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from omnisparse_flex.attention.scalar_graph import UntraceableError
from omnisparse_flex.attention.trace_mask import indices_on, trace_scalars
from omnisparse_flex.types import ScoreMod


def with_captures(
    score_mod: ScoreMod, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A ``score_mod`` and what it learns through.

    Args:
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, pointwise.
        dtype: Of the logits.
        device: Where they lie.

    Returns:
        ``(score, b, h, q_idx, kv_idx, *tensors) -> score`` and the tensors, every one that the function closes over;
        the function itself and no tensors where none of them requires a gradient, or it cannot be traced.
    """
    try:
        graph = trace_scalars(
            score_mod, "score_mod", [torch.zeros((), dtype=dtype, device=device), *indices_on(device)]
        )
    except UntraceableError:
        return score_mod, ()
    captured = _as_arguments(graph)
    if not any(x.requires_grad for x in captured):
        return score_mod, ()
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor):
        # As a user writes it: the operator gives this spelling a gradient that is summed over all pairs.
        source, indices = node.args
        node.target, node.args = operator.getitem, (source, tuple(indices))
    graph.recompile()
    return graph, _detached(graph, captured, dtype, device)


def _as_arguments(graph: GraphModule) -> list[Tensor]:
    """Turn the tensors that a traced graph holds into inputs behind its own: each once, however often it is read."""
    captured: dict[int, tuple[Tensor, Node]] = {}
    last = graph.graph.find_nodes(op="placeholder", sort=True)[-1]
    for node in graph.graph.find_nodes(op="get_attr", sort=True):
        tensor = getattr(graph, str(node.target))
        if id(tensor) not in captured:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"captured_{len(captured)}")
            captured[id(tensor)] = tensor, last
        node.replace_all_uses_with(captured[id(tensor)][1])
        graph.graph.erase_node(node)
    return [tensor for tensor, _ in captured.values()]


def _detached(
    graph: GraphModule, captured: list[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """The tensors, those without a gradient that have none through the function: the operator takes no others."""
    learned = [x for x in captured if x.requires_grad]
    with torch.enable_grad():
        out = graph(torch.zeros((), dtype=dtype, device=device, requires_grad=True), *indices_on(device), *captured)
    found = torch.autograd.grad(out, learned, allow_unused=True) if out.requires_grad else [None] * len(learned)
    idle = {id(x) for x, gradient in zip(learned, found, strict=True) if gradient is None}
    return tuple(x.detach() if id(x) in idle else x for x in captured)

"""Read a user's ``mask_mod``, and what a ``score_mod`` forbids, into an index expression by tracing it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from omnisparse_flex.attention.scalar_graph import UntraceableError, read_scalar_graph
from omnisparse_flex.masks.expr.expr import axes
from omnisparse_flex.masks.expr.forbidden import SCORE, split_additive
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.masks.expr.simplify import simplify
from omnisparse_flex.types import MaskMod, ScoreMod


def trace_mask_mod(mask_mod: MaskMod, device: torch.device) -> IndexMask:
    """Read a ``mask_mod`` into an ``IndexMask`` by tracing it on scalar indices.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, pointwise; tensors it closes over
            become the mask's buffers (by reference).
        device: Where the index scalars live.

    Returns:
        The equivalent mask.

    Raises:
        UntraceableError: If the function does something outside the pointwise vocabulary.
    """
    return read_scalar_graph(trace_scalars(mask_mod, "mask_mod", indices_on(device)))


def trace_forbidden(score_mod: ScoreMod, dtype: torch.dtype, device: torch.device) -> IndexMask:
    """The pairs that a ``score_mod`` leaves: where it gives -inf or less than any logit, whatever the logit is.

    Args:
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, pointwise.
        dtype: Of the logits.
        device: Where they lie.

    Returns:
        The mask; ``NO_MASK`` where nothing is forbidden or the function cannot be read: it is applied anyway.
    """
    score = torch.zeros((), dtype=dtype, device=device)
    try:
        read = read_scalar_graph(trace_scalars(score_mod, "score_mod", [score, *indices_on(device)]), first=(SCORE,))
    except UntraceableError:
        return NO_MASK
    allowed, _ = split_additive(read.expr, [x.dtype for x in read.buffers])
    return IndexMask(simplify(allowed), tuple(x.detach() for x in read.buffers)) if axes(allowed) else NO_MASK


def indices_on(device: torch.device) -> list[Tensor]:
    """Stand-ins for ``(b, h, q_idx, kv_idx)``."""
    return [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]


def trace_scalars(function: Callable[..., Tensor], name: str, scalars: list[Tensor]) -> GraphModule:
    """The aten graph of a pointwise function of scalars; ``name`` is what an error calls it.

    Raises:
        UntraceableError: If the function does what tracing does not know.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # not at import: slow

    try:
        # Without the mode, indexing a captured tensor with a 0-d index would read the index's value.
        with TransformGetItemToIndex(), torch.no_grad():
            return make_fx(function, tracing_mode="real")(*scalars)
    except Exception as error:
        raise UntraceableError(f"{name} cannot be traced: {error}") from error

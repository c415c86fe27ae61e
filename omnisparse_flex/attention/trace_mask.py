"""Read a user's ``mask_mod`` into an index expression by tracing it."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from omnisparse_flex.masks.expr.program import MaskProgram, UntraceableError, read_scalar_graph
from omnisparse_flex.types import MaskMod


def trace_mask_mod(mask_mod: MaskMod, device: torch.device) -> MaskProgram:
    """Read a ``mask_mod`` into a program by tracing it on scalar indices.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, pointwise; tensors it closes over
            become the program's buffers (by reference).
        device: Where the index scalars live.

    Returns:
        The equivalent program.

    Raises:
        UntraceableError: If the function does something outside the pointwise vocabulary.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex  # not at import: slow

    scalars = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
    try:
        # Without the mode, indexing a captured tensor with a 0-d index would read the index's value.
        with TransformGetItemToIndex():
            graph = make_fx(mask_mod, tracing_mode="real")(*scalars)
    except Exception as error:
        raise UntraceableError(f"mask_mod cannot be traced: {error}") from error
    return read_scalar_graph(graph)

"""Gradients of token attention where nothing but its inputs was kept."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.tokens.dispatch import attend_tokens, mask_for_kernels, segments_of_site, text_queries
from omnisparse_flex.attention.tokens.tensor_code import gradients_through


def token_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, site: SparseCall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything once more, with gradients: the selection is a function of the same inputs, so it is the same.

    Args:
        grad: (B, Hq, L, Dv), of the output.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        site: The rest.

    Returns:
        Of query, key, value and the sinks, each of its shape and dtype.
    """
    mask = mask_for_kernels(query, key, value, site)
    if mask is not None:
        from omnisparse_flex.attention.tokens.triton import token_backward_triton

        inputs = (site, mask, segments_of_site(query, key, site), text_queries(query, key, site))
        gradients = token_backward_triton(grad, query, key, value, *inputs)
        if gradients is not None:
            return gradients
    return gradients_through(attend_tokens, grad, query, key, value, site)

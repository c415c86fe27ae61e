"""Gradients of token attention where nothing but its inputs was kept."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.tokens.dispatch import attend_tokens, plain_for_kernels, segments_of_site, text_queries
from omnisparse_flex.attention.tokens.tensor_code import gradients_through


def token_gradients(
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
    plain = plain_for_kernels(query, key, value, site)
    if plain is not None:
        from omnisparse_flex.attention.tokens.triton import gradients_quickly

        inputs = (site, plain, segments_of_site(query, key, site), text_queries(query, key, site))
        found = gradients_quickly(grad, query, key, value, *inputs)
        if found is not None:
            return found
    return gradients_through(attend_tokens, grad, query, key, value, site)

"""Gradients of a token selection in tensor code: where the kernels ran forward and cannot run backward."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.gathered import attend_gathered
from omnisparse_flex.masks.segments import SegmentLayout
from omnisparse_flex.site import Site
from omnisparse_flex.token_attention import attend_near, merge


def listed_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentLayout,
    chosen: tuple[Tensor, Tensor, Tensor, Tensor],
    site: Site,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention once more under a selection that was made, and its gradients.

    Args:
        grad: (B, Hq, L, Dv), of the output.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        segments: The always-kept blocks.
        chosen: ``rows``, ``row_count``, ``keys`` and ``key_count`` of the ``TokenSelection``.
        site: Mask, scale, segment size and logit sinks.

    Returns:
        Of query, key and value, each of its shape and dtype. Those of the sinks need no listed keys.
    """
    rows, row_count, keys, key_count = chosen
    # What is not chosen may be any number.
    taken = torch.arange(keys.shape[-1], device=keys.device) < key_count.unsqueeze(-1)
    keys = torch.where(taken, keys, 0).long()
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        near = attend_near(q, k, v, segments, site)
        far = attend_gathered(q, k, v, rows, row_count, keys, key_count, site)
        out = merge(*near, *far, site.sinks)
    of_query, of_key, of_value = torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
    return of_query, of_key, of_value

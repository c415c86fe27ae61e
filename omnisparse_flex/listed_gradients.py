"""Gradients of a token selection in tensor code: where the kernels ran forward and cannot run backward."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from omnisparse_flex.masks.tokens import TokenSelection
from omnisparse_flex.site import Site
from omnisparse_flex.token_attention import attend_near, attend_selected


def listed_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, site: Site
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Attention once more under a selection that was made, and its gradients.

    Args:
        grad: (B, Hq, L, Dv), of the output.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        selection: What was selected.
        site: Rules, mask, scale and logit sinks.

    Returns:
        Of query, key, value and the sinks, each of its shape and dtype.
    """
    with torch.enable_grad():
        learning = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, site.sinks)]
        q, k, v, sinks = learning
        assert q is not None and k is not None and v is not None
        near = attend_near(q, k, v, selection.segments, site)
        out = attend_selected(q, k, v, *near, selection, dataclasses.replace(site, sinks=sinks))
    given = [x for x in learning if x is not None]
    of_query, of_key, of_value, *own = torch.autograd.grad(out, given, grad.to(out.dtype))
    return of_query, of_key, of_value, own[0] if own else None

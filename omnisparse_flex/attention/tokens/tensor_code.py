"""Gradients of a token selection in tensor code: where the kernels ran forward and cannot run backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.attention.call import Site
from omnisparse_flex.attention.tokens.dispatch import attend_near, attend_selected
from omnisparse_flex.masks.tokens.segments import per_member
from omnisparse_flex.masks.tokens.select import TokenSelection


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
    # As many heads as chose: KV heads, or copies of them for all query heads.
    group = selection.rows.shape[1] // key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, own: Site) -> Tensor:
        k, v = per_member(k, group), per_member(v, group)
        return attend_selected(q, k, v, *attend_near(q, k, v, selection.segments, own), selection, own)

    return gradients_through(attend, grad, query, key, value, site)


def gradients_through(
    attend: Callable[[Tensor, Tensor, Tensor, Site], Tensor],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    site: Site,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What ``attend``, called once more, gives by autograd; the rest as in ``listed_gradients``."""
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (query, key, value, site.sinks) if x is not None]
        q, k, v, *sinks = given
        out = attend(q, k, v, dataclasses.replace(site, sinks=sinks[0] if sinks else None))
    of_query, of_key, of_value, *own = torch.autograd.grad(out, given, grad.to(out.dtype))
    return of_query, of_key, of_value, own[0] if own else None

"""Token granularity in tensor code: all queries over what is always kept, active ones over gathered keys, merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.lse_attention import merge
from omnisparse_flex.attention.tokens.gathered import attend_gathered
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.tokens.key_bits import bits_of_blocks
from omnisparse_flex.masks.tokens.segments import SegmentLayout, per_member, tokens_of_blocks
from omnisparse_flex.masks.tokens.select import TokenSelection, list_width, select_tokens


def select_and_attend(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentLayout, text: Tensor, site: SparseCall
) -> tuple[Tensor, TokenSelection]:
    """The output, differentiable, and the selection.

    Keys and values are copied for each query head that chooses for itself (``gqa_choice="head"``); autograd sums the
    copies' gradients.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        segments: The site's always-kept blocks, and blocks to choose from.
        text: bool (B or 1, L), queries that are always active.
        site: The rest.
    """
    group = site.config.choices(query.shape[1], key.shape[1]) // key.shape[1]
    key, value = per_member(key, group), per_member(value, group)
    near, near_lse = attend_near(query, key, value, segments, site)
    selection = choose(query, key, near_lse, segments, text, site)
    return attend_selected(query, key, value, near, near_lse, selection, site), selection


def choose(
    query: Tensor, key: Tensor, near_lse: Tensor, segments: SegmentLayout, text: Tensor, site: SparseCall
) -> TokenSelection:
    """What the site fetches beyond the always-kept keys; no gradients."""
    return select_tokens(
        query.detach(),
        key.detach(),
        near_lse.detach().float(),
        segments,
        text,
        site.config,
        block=BLOCK,
        target=site.target,
        scale=site.scale_for(query),
        pairs=None if site.mask.rescue_blocks == "none" else site.mask.pairs,
        score=site.plain_score if site.changes_scores else None,
    )


def attend_near(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentLayout, site: SparseCall
) -> tuple[Tensor, Tensor]:
    """Every query over its segment's always-kept blocks; ``(out, lse)`` as of ``attend_gathered``."""
    count = tokens_of_blocks(segments.forced, BLOCK, key.shape[2]).sum(-1)
    size = (query.shape[0], key.shape[1], count.shape[2])
    height = query.shape[1] // key.shape[1] * site.config.segment_size
    rows = torch.arange(height, device=query.device).expand(*size, height)
    row_count = torch.full(size, height, device=query.device)
    bits = bits_of_blocks(segments.forced, BLOCK)
    return attend_gathered(query, key, value, rows, row_count, bits, count, key.shape[2], site)


def attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    near: Tensor,
    near_lse: Tensor,
    selection: TokenSelection,
    site: SparseCall,
) -> Tensor:
    """The output, from that over the always-kept keys (``attend_near``) and what was selected beyond them."""
    chosen = (selection.rows.long(), selection.row_count, selection.chosen, selection.key_count)
    far, far_lse = attend_gathered(query, key, value, *chosen, list_width(site.config, key.shape[2]), site)
    return merge(near, near_lse, far, far_lse, site.sinks).to(value.dtype)


def recompute_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, site: SparseCall
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

    def attend(q: Tensor, k: Tensor, v: Tensor, call: SparseCall) -> Tensor:
        k, v = per_member(k, group), per_member(v, group)
        return attend_selected(q, k, v, *attend_near(q, k, v, selection.segments, call), selection, call)

    return gradients_through(attend, grad, query, key, value, site)


def gradients_through(
    attend: Callable[[Tensor, Tensor, Tensor, SparseCall], Tensor],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    site: SparseCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What ``attend``, called once more, gives by autograd; the rest as in ``recompute_backward``."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value, site.sinks) if x is not None]
        q, k, v, *sinks = inputs
        out = attend(q, k, v, dataclasses.replace(site, sinks=sinks[0] if sinks else None))
    of_query, of_key, of_value, *of_sinks = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    return of_query, of_key, of_value, of_sinks[0] if of_sinks else None

"""Token granularity: always-kept keys for every query, gathered keys for the active ones, merged by log-sum-exp."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from omnisparse_flex.attention.call import Site
from omnisparse_flex.attention.tokens.gathered import attend_gathered
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import BLOCK, grid_of
from omnisparse_flex.masks.expr.causal_padding import PlainMask, plain_mask
from omnisparse_flex.masks.tokens.key_bits import bits_of_blocks
from omnisparse_flex.masks.tokens.segments import SegmentLayout, per_member, segment_layout, tokens_of_blocks
from omnisparse_flex.masks.tokens.select import TokenSelection, columns, select_tokens


def attend_tokens(query: Tensor, key: Tensor, value: Tensor, site: Site) -> Tensor:
    """Run one attention site at token granularity.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        site: The rest.

    Returns:
        (B, Hq, L, Dv).

    Source: PAPER "Lazy + active in one output": part 1 is every query over sinks, window and
    text; part 2 the active queries over the gathered keys; the two are merged by their
    log-sum-exps and share no key. Our choice: part 1 takes whole blocks of 128 keys and
    is the same for all queries of a segment (``segment_layout``). Where statistics are
    recorded the selection of all queries is kept, as bits; else no more than a stretch's is.
    """
    out, selection = attend_and_select(query, key, value, site, site.write is not None)
    if site.write is not None:
        assert selection is not None
        site.write(site.measured(selection, query.detach(), key.detach()))
    return out


def attend_and_select(
    query: Tensor, key: Tensor, value: Tensor, site: Site, keep: bool = True
) -> tuple[Tensor, TokenSelection | None]:
    """The output and, to ``keep``, the selection: in kernels where there are some, else in tensor code.

    Tensor code copies keys and values for each query head that chooses for itself (``gqa_choice="head"``); autograd
    sums the copies' gradients.
    """
    segments, text = segments_of_site(query, key, site), text_queries(query, key, site)
    plain = plain_for_kernels(query, key, value, site)
    if plain is not None:
        from omnisparse_flex.attention.tokens.triton import attend_quickly

        found = attend_quickly(query, key, value, site, plain, segments, text, keep)
        if found is not None:
            return found
    assert site.config is not None
    group = site.config.choices(query.shape[1], key.shape[1]) // key.shape[1]
    key, value = per_member(key, group), per_member(value, group)
    near, near_lse = attend_near(query, key, value, segments, site)
    selection = choose(query, key, near_lse, segments, text, site)
    return attend_selected(query, key, value, near, near_lse, selection, site), selection


def plain_for_kernels(query: Tensor, key: Tensor, value: Tensor, site: Site) -> PlainMask | None:
    """The site's mask where the kernels can run, else None; shapes as in ``attend_tokens``."""
    if not takes_kernels(query, value, site) or not _has_triton():
        return None
    return plain_mask(site.mask, query.shape[0], key.shape[2], query.device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes_kernels(query: Tensor, value: Tensor, site: Site) -> bool:
    """Whether the kernels can run, its mask aside: query (B, Hq, L, D), value (B, Hkv, S, Dv)."""
    assert site.config is not None
    dim = query.shape[3]
    fits = 16 <= dim <= 256 and dim & (dim - 1) == 0 and value.shape[3] == dim and query.dtype != torch.float64
    # Keys' gradients are summed in no fixed order.
    ours = site.config.scorer == "one_pass" and not site.changes_scores
    return query.is_cuda and fits and ours and not torch.are_deterministic_algorithms_enabled()


def choose(
    query: Tensor, key: Tensor, near_lse: Tensor, segments: SegmentLayout, text: Tensor, site: Site
) -> TokenSelection:
    """What the site fetches beyond the always-kept keys; no gradients."""
    assert site.config is not None
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
        pairs=None if site.mask.blind_rows_need == "nothing" else site.mask.pairs,
        score=site.plain_score if site.changes_scores else None,
    )


def attend_near(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentLayout, site: Site
) -> tuple[Tensor, Tensor]:
    """Every query over its segment's always-kept blocks; ``(out, lse)`` as of ``attend_gathered``."""
    assert site.config is not None
    count = tokens_of_blocks(segments.forced, BLOCK, key.shape[2]).sum(-1)
    size = (query.shape[0], key.shape[1], count.shape[2])
    height = query.shape[1] // key.shape[1] * site.config.segment_size
    rows = torch.arange(height, device=query.device).expand(*size, height)
    every = torch.full(size, height, device=query.device)
    bits = bits_of_blocks(segments.forced, BLOCK)
    return attend_gathered(query, key, value, rows, every, bits, count, key.shape[2], site)


def attend_selected(
    query: Tensor, key: Tensor, value: Tensor, near: Tensor, near_lse: Tensor, selection: TokenSelection, site: Site
) -> Tensor:
    """The output, from that over the always-kept keys (``attend_near``) and what was selected beyond them."""
    assert site.config is not None
    chosen = (selection.rows.long(), selection.row_count, selection.chosen, selection.key_count)
    far, far_lse = attend_gathered(query, key, value, *chosen, columns(site.config, key.shape[2]), site)
    out = merge(near, near_lse, far, far_lse, site.sinks).to(value.dtype)
    if site.config.lazy_mode == "skip":
        out = out.masked_fill((selection.lazy & ~selection.active).unsqueeze(-1), 0.0)
    return out


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, sinks: Tensor | None = None) -> Tensor:
    """One softmax from two over disjoint keys, and the sinks.

    Args:
        a: (B, Hq, L, Dv), softmax-weighted values of the one.
        a_lse: (B, Hq, L), its log-sum-exp; -inf where it has no key.
        b: (B, Hq, L, Dv) of the other.
        b_lse: (B, Hq, L).
        sinks: (Hq,), logit of each head's virtual key without a value, or None.

    Returns:
        (B, Hq, L, Dv); 0 where neither has a key. Differentiable, log-sum-exps and sinks included.
    """
    top = torch.maximum(a_lse, b_lse).detach()
    logit = None if sinks is None else sinks.to(top.dtype)[:, None]
    if logit is not None:
        top = torch.maximum(top, logit.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight_a, weight_b = torch.exp(a_lse - top).unsqueeze(-1), torch.exp(b_lse - top).unsqueeze(-1)
    total = weight_a + weight_b
    if logit is not None:
        total = total + torch.exp(logit - top).unsqueeze(-1)
    return (a * weight_a + b * weight_b) / total.masked_fill(total == 0, 1.0)


def segments_of_site(query: Tensor, key: Tensor, site: Site) -> SegmentLayout:
    """What the site keeps whatever its queries and keys hold: query (B, Hq, L, D), key (B, Hkv, S, D)."""
    assert site.config is not None
    layout = site.layout
    if layout is None:
        layout = block_layout(site.mask, grid_of(query, key), site.config, visual=site.visual, q_offset=site.q_offset)
    choices = site.config.choices(int(query.shape[1]), int(key.shape[1]))
    return segment_layout(layout, site.config.segment_size // BLOCK, choices)


def text_queries(query: Tensor, key: Tensor, site: Site) -> Tensor:
    """Queries that hold a text token, bool (B or 1, L); a row without visual tokens has none."""
    q_len, device = query.shape[2], query.device
    if site.visual is None:
        return torch.zeros((1, q_len), dtype=torch.bool, device=device)
    text = ~site.visual & site.visual.any(-1, keepdim=True)
    own = (torch.arange(q_len, device=device) + site.q_offset).clamp(min=0, max=key.shape[2] - 1)
    return text.index_select(1, own)

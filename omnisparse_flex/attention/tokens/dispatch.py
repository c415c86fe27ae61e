"""Token granularity: in Triton kernels where they can run, in tensor code elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.tokens.tensor_code import select_and_attend
from omnisparse_flex.kernels.fallback import fits_kernels, has_triton
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import BLOCK, grid_of
from omnisparse_flex.masks.expr.causal_padding import CausalPaddingMask, as_causal_padding
from omnisparse_flex.masks.tokens.segments import SegmentLayout, segment_layout
from omnisparse_flex.masks.tokens.select import TokenSelection


def attend_tokens(query: Tensor, key: Tensor, value: Tensor, site: SparseCall) -> Tensor:
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
    recorded the selection of all queries is kept, as bits; else no more than a chunk's is.
    """
    out, selection = attend_and_select(query, key, value, site, site.write is not None)
    if site.write is not None:
        assert selection is not None
        site.write(site.stats_of(selection, query.detach(), key.detach()))
    return out


def attend_and_select(
    query: Tensor, key: Tensor, value: Tensor, site: SparseCall, keep: bool = True
) -> tuple[Tensor, TokenSelection | None]:
    """The output and, to ``keep``, the selection: in kernels where there are some, else in tensor code."""
    segments, text = segments_of_site(query, key, site), text_queries(query, key, site)
    mask = mask_for_kernels(query, key, value, site)
    if mask is not None:
        from omnisparse_flex.attention.tokens.triton import attend_tokens_triton

        result = attend_tokens_triton(query, key, value, site, mask, segments, text, keep)
        if result is not None:
            return result
    return select_and_attend(query, key, value, segments, text, site)


def mask_for_kernels(query: Tensor, key: Tensor, value: Tensor, site: SparseCall) -> CausalPaddingMask | None:
    """The site's mask where the kernels can run, else None; shapes as in ``attend_tokens``."""
    if not takes_kernels(query, value, site) or not has_triton():
        return None
    return as_causal_padding(site.mask, query.shape[0], key.shape[2], query.device)


def takes_kernels(query: Tensor, value: Tensor, site: SparseCall) -> bool:
    """Whether the kernels can run, its mask aside: query (B, Hq, L, D), value (B, Hkv, S, Dv)."""
    if not query.is_cuda or site.changes_scores or not fits_kernels(query, value):
        return False
    return not torch.are_deterministic_algorithms_enabled()  # keys' gradients are summed in no fixed order


def segments_of_site(query: Tensor, key: Tensor, site: SparseCall) -> SegmentLayout:
    """What the site keeps whatever its queries and keys hold: query (B, Hq, L, D), key (B, Hkv, S, D)."""
    layout = site.layout
    if layout is None:
        layout = block_layout(site.mask, grid_of(query, key), site.config, visual=site.visual, q_offset=site.q_offset)
    choices = site.config.choices(int(query.shape[1]), int(key.shape[1]))
    return segment_layout(layout, site.config.segment_size // BLOCK, choices)


def text_queries(query: Tensor, key: Tensor, site: SparseCall) -> Tensor:
    """Queries that hold a text token, bool (B or 1, L); a row without visual tokens has none."""
    q_len, device = query.shape[2], query.device
    if site.visual is None:
        return torch.zeros((1, q_len), dtype=torch.bool, device=device)
    text = ~site.visual & site.visual.any(-1, keepdim=True)
    positions = (torch.arange(q_len, device=device) + site.q_offset).clamp(min=0, max=key.shape[2] - 1)
    return text.index_select(1, positions)

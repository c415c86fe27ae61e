"""Token selection: which queries of a segment look far, and the few keys they fetch together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.budget import need, rank, shared_budget
from omnisparse_flex.masks.column_mass import column_mass
from omnisparse_flex.masks.one_pass import one_pass
from omnisparse_flex.masks.pooled_lse import pooled_lse
from omnisparse_flex.masks.queries import LAZY_STRIDE, REDUNDANCY_THRESHOLD
from omnisparse_flex.masks.segments import SegmentLayout, pack_rows, tokens_of_blocks, wide_dtype
from omnisparse_flex.types import MaskMod, ScoreMod

#: Estimators by name; each one's products for a pair, as a share of attention's own, is a half.
ESTIMATORS = {"one_pass": one_pass, "column_mass": column_mass}


class TokenSelection(NamedTuple):
    """What one attention site fetches beyond the always-kept keys; M segments of ``segment_size`` queries.

    The query heads of a KV head's group fetch together: R = group * segment_size rows share one
    set of keys. Row ``g * segment_size + i`` is query i of the segment in head g of the group.

    Attributes:
        segments: The always-kept blocks.
        active: bool (B, Hq, L), queries that fetch.
        lazy: bool (B, Hq, L), queries that look near and repeat their neighbours.
        rows: int64 (B, Hkv, M, R), a segment's rows, active ones first.
        row_count: int64 (B, Hkv, M), number of active ones.
        keys: int (B, Hkv, M, K), key positions, those that are kept first; K is the capacity.
        key_count: int64 (B, Hkv, M), how many of them are kept.
        needs: int64 (B, Hkv, M), how many each head would need.
        mass: float32 (B, Hkv, M), estimated share of the allowed mass that is kept, mean over active rows.
        overflow: bool (B, Hkv, M), segments whose need exceeded ``max_kv_budget``.
    """

    segments: SegmentLayout
    active: Tensor
    lazy: Tensor
    rows: Tensor
    row_count: Tensor
    keys: Tensor
    key_count: Tensor
    needs: Tensor
    mass: Tensor
    overflow: Tensor


@torch.no_grad()
def select_tokens(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    segments: SegmentLayout,
    text: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    target: Tensor | float,
    scale: float,
    pairs: MaskMod | None,
    score: ScoreMod | None,
) -> TokenSelection:
    """Choose the active queries and the keys of every segment.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        near_lse: float32 (B, Hq, L), log-sum-exp of each query's always-kept logits; -inf: none.
        segments: Blocks that are always kept, and blocks to choose from.
        text: bool (B or 1, L), queries that are always active.
        config: Rules.
        block: Tokens per block of ``segments``.
        target: Recall to keep, number or 0-d tensor.
        scale: Logit scale.
        pairs: The model's own mask; None: it allows every pair of an eligible block.
        score: The model's own change of the logits, or None.

    Returns:
        The selection; a pure function of its inputs. No tensor over queries x keys: the work
        goes segment by segment in steps of ``CHUNK_LOGITS``.

    Source: PAPER "Query selection", "KV selection" at token granularity.
    """
    eligible = segments.eligible
    active, lazy = active_tokens(query, key, near_lse, eligible, text, config, block=block, scale=scale, score=score)
    rows, row_count = pack_rows(active, key.shape[1], config.segment_size)
    mass, kept = ESTIMATORS[config.scorer](
        query, key, near_lse, eligible, rows, row_count, config, block=block, scale=scale, pairs=pairs, score=score
    )
    tokens = tokens_of_blocks(eligible, block, key.shape[2]).expand_as(mass)
    ranked, order = rank(mass, tokens)
    needs = need(ranked, kept, tokens.sum(-1), target)
    most = key.shape[2] if config.max_kv_budget is None else min(config.max_kv_budget, key.shape[2])
    overflow = needs > most
    budget = shared_budget(needs.clamp(max=most), row_count > 0, config.budget)
    # A head may be asked for more keys than it can see; what is not eligible comes last.
    key_count = torch.minimum(budget, tokens.sum(-1))
    places = torch.arange(ranked.shape[-1], device=key.device)
    total = kept + (ranked * (places < key_count.unsqueeze(-1))).sum(-1)
    return TokenSelection(
        segments,
        active,
        lazy,
        rows,
        row_count,
        order[..., : columns(config, most)],
        key_count,
        needs,
        total,
        overflow & (row_count > 0),
    )


def columns(config: OmniSparseConfig, most: int) -> int:
    """Columns of the lists of keys, where a head gets at most ``most``: one at least, used or not."""
    return max(1, min(most, config.budget) if isinstance(config.budget, int) else most)


def active_tokens(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    text: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    scale: float,
    score: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """``(active, lazy)``, bool (B, Hq, L); the arguments are those of ``select_tokens``.

    Source: PAPER "Query selection": active if breadth > tau_b, or redundancy < tau_r, or
    text. Our choice: the mass beyond the always-kept keys is that on block means, each
    standing for a whole block (a lower bound of the block's own sum, by convexity); the
    "nearest earlier kept neighbour" is the first query of a run of ``LAZY_STRIDE``.
    """
    batch, heads, q_len, _ = query.shape
    if config.lazy_threshold is None:
        lazy = torch.zeros((batch, heads, q_len), dtype=torch.bool, device=query.device)
        return ~lazy, lazy
    far = pooled_lse(query, key, eligible, config.segment_size, block=block, pool=block, scale=scale, score=score)
    breadth = torch.where(far == -torch.inf, 0.0, torch.sigmoid(far - near_lse))
    places = torch.arange(q_len, device=query.device)
    leader = places - places % LAZY_STRIDE
    direction = F.normalize(query.to(wide_dtype(query)), dim=-1)
    redundancy = (direction * direction.index_select(2, leader)).sum(-1)
    lazy = (breadth < config.lazy_threshold) & (redundancy >= REDUNDANCY_THRESHOLD) & ~text[:, None]
    return ~lazy | (places == leader), lazy


def kept_pairs(selection: TokenSelection, places: Tensor, kv_len: int, config: OmniSparseConfig, block: int) -> Tensor:
    """Which keys the given queries keep, the model's own mask aside.

    Args:
        selection: What was chosen.
        places: int64 (P,), query indices.
        kv_len: Number of keys.
        config: The rules of the selection.
        block: Tokens per block.

    Returns:
        bool (B, Hq, P, S).
    """
    heads, kv_heads = selection.active.shape[1], selection.rows.shape[1]
    segment = places // config.segment_size
    keys, count = selection.keys.index_select(2, segment), selection.key_count.index_select(2, segment)
    chosen = torch.arange(keys.shape[-1], device=keys.device) < count.unsqueeze(-1)
    # What is not chosen may be any number: one place past the end takes it.
    keys = torch.where(chosen, keys, kv_len).long()
    fetched = torch.zeros((*keys.shape[:3], kv_len + 1), dtype=torch.bool, device=keys.device)
    fetched = fetched.scatter(-1, keys, chosen)[..., :kv_len]
    near = tokens_of_blocks(selection.segments.near.index_select(2, places // block), block, kv_len).expand_as(fetched)
    fetched, near = (x.repeat_interleave(heads // kv_heads, 1) for x in (fetched, near))
    active, lazy = (x.index_select(2, places).unsqueeze(-1) for x in (selection.active, selection.lazy))
    kept = near | (fetched & active)
    return kept & (active | ~lazy) if config.lazy_mode == "skip" else kept

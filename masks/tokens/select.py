"""Token selection: which queries of a segment look far, and the few keys they fetch together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.budget import keep_top, need, rank, shared_budget
from omnisparse_flex.masks.blocks.lazy import LAZY_STRIDE, REDUNDANCY_THRESHOLD
from omnisparse_flex.masks.tokens.chunks import segments_per_chunk
from omnisparse_flex.masks.tokens.head_dims import top_head_dims
from omnisparse_flex.masks.tokens.key_bits import pack_bits, unpack_bits
from omnisparse_flex.masks.tokens.one_pass import one_pass
from omnisparse_flex.masks.tokens.pooled_lse import pooled_lse
from omnisparse_flex.masks.tokens.segments import SegmentLayout, pack_rows, tokens_of_blocks, wide_dtype
from omnisparse_flex.types import MaskMod, ScoreMod

#: What ranking takes for each mass: in float32 the masses, as they are sorted, and their running sum; the order in
#: int64; and a few flags.
RANKED_BYTES = 32


class TokenSelection(NamedTuple):
    """What one attention site fetches beyond the always-kept keys; M segments of ``segment_size`` queries.

    Hc heads choose: the KV heads, for their groups of query heads, or the query heads themselves (``gqa_choice``).
    The query heads of a group fetch together: R = Hq / Hc * segment_size rows share one set of keys. Row
    ``g * segment_size + i`` is query i of the segment in head g of the group.

    Attributes:
        segments: The always-kept blocks, their head axis 1 or Hc.
        active: bool (B, Hq, L), queries that fetch.
        lazy: bool (B, Hq, L), queries that look near and repeat their neighbours.
        rows: int (B, Hc, M, R), a segment's rows, active ones first.
        row_count: int64 (B, Hc, M), number of active ones.
        chosen: int32 (B, Hc, M, words), the keys that a segment fetches as bits, see ``pack_bits``: at 128K keys
            a 32nd of what lists of all keys would take, and an eighth of the keys and values (4 KV heads, D=128).
        key_count: int64 (B, Hc, M), how many they are.
        needs: int64 (B, Hc, M), how many each head would need.
        mass: float32 (B, Hc, M), estimated share of the allowed mass that is kept, mean over active rows.
        overflow: bool (B, Hc, M), segments whose need exceeded ``max_kv_budget``.
    """

    segments: SegmentLayout
    active: Tensor
    lazy: Tensor
    rows: Tensor
    row_count: Tensor
    chosen: Tensor
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
        key: (B, Hc, S, D), a head for each choice.
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
        goes segment by segment in steps of ``CHUNK_LOGITS``, and no more than a few segments'
        masses exist at a time.

    Source: PAPER "Query selection", "KV selection" at token granularity.
    """
    segment, count = config.segment_size, segments.eligible.shape[2]
    bytes_per_segment = RANKED_BYTES * key.shape[0] * key.shape[1] * key.shape[2]
    step, parts = segments_per_chunk(count, bytes_per_segment, key, 1), []
    columns = None if config.scoring_dims is None else top_head_dims(query, key, key.shape[1], config.scoring_dims)
    for first in range(0, count, step):
        part, queries = slice(first, first + step), slice(first * segment, (first + step) * segment)
        eligible = segments.eligible[:, :, part]
        inputs = (query[:, :, queries], key, near_lse[:, :, queries], eligible, text[:, queries], config)
        rules: dict[str, Any] = {"block": block, "scale": scale, "score": score, "first": first}
        parts.append(_select(*inputs, target=target, pairs=pairs, columns=columns, **rules))
    return TokenSelection(segments, *(torch.cat(fields, 2) for fields in zip(*parts, strict=True)))


def _select(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    text: Tensor,
    config: OmniSparseConfig,
    *,
    target: Tensor | float,
    pairs: MaskMod | None,
    columns: Tensor | None,
    **rules: Any,
) -> tuple[Tensor, ...]:
    """The fields of a ``TokenSelection`` from ``active`` on, for some segments."""
    active, lazy = active_tokens(query, key, near_lse, eligible, text, config, **rules)
    rows, row_count = pack_rows(active, key.shape[1], config.segment_size)
    inputs = (query, key, near_lse, eligible, rows, row_count, config)
    mass, kept = one_pass(*inputs, pairs=pairs, columns=columns, **rules)
    tokens = tokens_of_blocks(eligible, rules["block"], key.shape[2]).expand_as(mass)
    ranked, order = rank(mass, tokens)
    needs = need(ranked, kept, tokens.sum(-1), target)
    max_budget = largest_budget(config, key.shape[2])
    overflow = needs > max_budget
    budget = shared_budget(needs.clamp(max=max_budget), row_count > 0, config.budget)
    # A head may be asked for more keys than it can see; what is not eligible comes last.
    key_count = torch.minimum(budget, tokens.sum(-1))
    places = torch.arange(ranked.shape[-1], device=key.device)
    total = kept + (ranked * (places < key_count.unsqueeze(-1))).sum(-1)
    chosen = pack_bits(keep_top(order, tokens, key_count))
    return active, lazy, rows, row_count, chosen, key_count, needs, total, overflow & (row_count > 0)


def largest_budget(config: OmniSparseConfig, kv_len: int) -> int:
    """Most keys that a head gets, whatever it needs."""
    return kv_len if config.max_kv_budget is None else min(config.max_kv_budget, kv_len)


def list_width(config: OmniSparseConfig, kv_len: int) -> int:
    """Width of the lists of chosen keys: one at least, used or not."""
    max_budget = largest_budget(config, kv_len)
    return max(1, min(max_budget, config.budget) if isinstance(config.budget, int) else max_budget)


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
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(active, lazy)``, bool (B, Hq, L); the arguments are those of ``select_tokens`` from segment ``first`` on.

    Source: PAPER "Query selection": active if breadth > tau_b, or redundancy < tau_r, or
    text. Our choice: the mass beyond the always-kept keys is that on block means, each
    standing for a whole block (a lower bound of the block's own sum, by convexity); the
    "nearest earlier kept neighbour" is the first query of a run of ``LAZY_STRIDE``.
    """
    batch, heads, q_len, _ = query.shape
    if config.lazy_below is None:
        lazy = torch.zeros((batch, heads, q_len), dtype=torch.bool, device=query.device)
        return ~lazy, lazy
    rules: dict[str, Any] = {"block": block, "pool": block, "scale": scale, "score": score, "first": first}
    far = pooled_lse(query, key, eligible, config.segment_size, **rules)
    breadth = torch.where(far == -torch.inf, 0.0, torch.sigmoid(far - near_lse))
    places = torch.arange(q_len, device=query.device)
    leader = places - places % LAZY_STRIDE
    direction = F.normalize(query.to(wide_dtype(query)), dim=-1)
    redundancy = (direction * direction.index_select(2, leader)).sum(-1)
    lazy = (breadth < config.lazy_below) & (redundancy >= REDUNDANCY_THRESHOLD) & ~text[:, None]
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
    heads, choices = selection.active.shape[1], selection.rows.shape[1]
    segment = places // config.segment_size
    fetched = unpack_bits(selection.chosen.index_select(2, segment), kv_len)
    near = tokens_of_blocks(selection.segments.near.index_select(2, places // block), block, kv_len).expand_as(fetched)
    fetched, near = (x.repeat_interleave(heads // choices, 1) for x in (fetched, near))
    return near | (fetched & selection.active.index_select(2, places).unsqueeze(-1))

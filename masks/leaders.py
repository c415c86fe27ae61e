"""How much of a query's attention lies on far keys, from the few keys that its segment's leaders look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.column_mass import CHUNK_LOGITS
from omnisparse_flex.masks.one_pass import one_pass
from omnisparse_flex.masks.pooled_lse import pooled_lse
from omnisparse_flex.masks.queries import LAZY_STRIDE
from omnisparse_flex.masks.segments import (
    row_places,
    segments_of,
    tokens_of_blocks,
    tokens_of_segments,
    wide_dtype,
)
from omnisparse_flex.types import MaskMod, ScoreMod

#: Keys to a mean in the leaders' own guess.
GUESS_POOL = 32
#: Keys that all queries of a segment are judged by. Our choice: at half of the queries active they lose 0.0058 of the
#: mass beyond the always-kept keys, exact rows 0.0052, means of 32 keys 0.0334 (``benchmarks/results/far_mass.json``).
LOOKED_AT = 128


def leader_rows(size: tuple[int, ...], height: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every ``LAZY_STRIDE``-th query of each segment as packed rows, see ``TokenSelection``.

    Args:
        size: Batch, heads that choose, segments.
        height: Rows of a segment, a multiple of 128.
        device: Where.

    Returns:
        int64 (*size, height), leaders first, and int64 (*size); strides are 0.
    """
    order = torch.arange(height, device=device).view(-1, LAZY_STRIDE).T.flatten()
    return order.expand(*size, height), torch.full((1,), height // LAZY_STRIDE, device=device).expand(size)


def looked_at_lse(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    scale: float,
    pairs: MaskMod | None,
    score: ScoreMod | None,
    first: int = 0,
    columns: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of every query over the keys that the leaders of its segment look at most.

    Leaders are the queries that are active whatever they look at. A lower bound of that over all
    eligible keys, and the same where there are no more than ``LOOKED_AT``.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hc, S, D), a head for each choice.
        near_lse: float32 (B, Hq, L), log-sum-exp of each query's always-kept logits.
        eligible: bool (B or 1, Hc or 1, M, NK).
        config: Rules.
        block: Tokens per block.
        scale: Logit scale.
        pairs: The model's own mask; None: it allows every pair of an eligible block.
        score: The model's own change of the logits, or None.
        first: Index of the first segment: the queries are those from there on.
        columns: int64 (B, Hc, dims), coordinates that the leaders' scores multiply; None: all.

    Returns:
        float32 (float64 for float64 queries) (B, Hq, L); -inf where nothing is eligible. Not finite
        where one of those keys is not: a leader takes it, whatever else it looks at.

    Source: Our choice, for PAPER "breadth". Means of keys hide the few loud ones that far attention goes to; the
    leaders' own scores find most of them, and cost a ``LAZY_STRIDE``-th of all scores.
    """
    rules: dict[str, Any] = {"block": block, "scale": scale, "score": score, "first": first}
    (batch, choices, kv_len, _), segment = key.shape, config.segment_size
    height = query.shape[1] // choices * segment
    rows, count = leader_rows((batch, choices, eligible.shape[2]), height, key.device)
    whole = torch.where(key.isfinite().all(-1, keepdim=True), key, 0.0)
    far = pooled_lse(query, whole, eligible, segment, pool=GUESS_POOL, **rules)
    mass, _ = one_pass(
        query, key, near_lse, eligible, rows, count, config, far=far, pairs=pairs, columns=columns, **rules
    )
    own = tokens_of_blocks(eligible, block, kv_len).expand_as(mass)
    heaviest = mass.masked_fill(~own, -1.0).topk(min(LOOKED_AT, kv_len), -1, sorted=False)
    allowed = heaviest.values >= 0
    queries = segments_of(query.to(wide_dtype(query)) * scale, choices, segment)
    batches = torch.arange(batch, device=key.device).view(-1, 1, 1, 1)
    step, end, found = max(1, CHUNK_LOGITS // (batch * choices * LOOKED_AT)), first * segment + query.shape[2], []
    for m in range(rows.shape[2]):
        at = heaviest.indices[:, :, m]
        keys = key.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])).to(queries.dtype)
        for start in range(0, height, step):
            stretch = torch.arange(start, min(start + step, height), device=key.device).view(1, 1, 1, -1)
            head, place = row_places(stretch.expand(1, choices, 1, -1), first + m, height // segment, segment, end)
            logits = queries[:, :, m, start : start + step] @ keys.transpose(-1, -2)
            places = (batches, head.transpose(2, 3), place.transpose(2, 3), at.unsqueeze(2))
            if score is not None:
                logits = score(logits, *places)
            sees = allowed[:, :, m, None]
            if pairs is not None:
                sees = sees & pairs(*places).to(torch.bool)
            found.append(logits.masked_fill(~sees, -torch.inf).logsumexp(-1))
    lse = torch.cat(found, 2).unflatten(2, (-1, height)).unsqueeze(-1)
    return tokens_of_segments(lse, query.shape[2], segment).squeeze(-1)

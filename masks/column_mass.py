"""The exact estimator: how much of their attention the active queries of a segment give to each key."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.segments import gather_rows, most, row_places, segments_of, tokens_of_blocks, wide_dtype
from omnisparse_flex.types import MaskMod, ScoreMod

#: Largest number of logits that one step of a chunked loop holds: 256 MiB in float32.
CHUNK_LOGITS = 1 << 26


def column_mass(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    rows: Tensor,
    row_count: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    scale: float,
    pairs: MaskMod,
    score: ScoreMod | None,
) -> tuple[Tensor, Tensor]:
    """Softmax mass that the active rows of each segment give to each key, and to the always-kept ones.

    Exact: every logit of an active row is computed once and dropped.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        near_lse: float32 (B, Hq, L).
        eligible: bool (B or 1, Hkv or 1, M, NK).
        rows: int64 (B, Hkv, M, R), active first.
        row_count: int64 (B, Hkv, M).
        config: Rules.
        block: Tokens per block.
        scale: Logit scale.
        pairs: The model's own mask.
        score: The model's own change of the logits, or None.

    Returns:
        float32 (B, Hkv, M, S) and (B, Hkv, M): means over the active rows that see any
        key; together they sum
        to 1, or to 0 for a segment without such rows.

    Source: PAPER "Scores"; FACTS: pooling or sampling queries loses the tokens.
    """
    batch, kv_heads, kv_len, _ = key.shape
    segment, group, wide = config.segment_size, query.shape[1] // kv_heads, wide_dtype(query)
    queries, near = segments_of(query, kv_heads, segment), segments_of(near_lse.unsqueeze(-1), kv_heads, segment)
    kv, keys = torch.arange(kv_len, device=key.device), key.to(wide).transpose(-1, -2).unsqueeze(2)
    b = torch.arange(batch, device=key.device).view(-1, 1, 1, 1, 1)
    masses, kepts = [], []
    tile = max(1, min(segment, CHUNK_LOGITS // max(1, batch * kv_heads * kv_len)))
    for m in range(rows.shape[2]):
        own = tokens_of_blocks(eligible[:, :, m : m + 1], block, kv_len).unsqueeze(-2)
        count = row_count[:, :, m : m + 1]
        mass = torch.zeros((batch, kv_heads, 1, kv_len), device=key.device)
        kept = torch.zeros((batch, kv_heads, 1), device=key.device)
        seeing = torch.zeros_like(kept)
        for start in range(0, most(count, rows.shape[-1]), tile):
            part = rows[:, :, m : m + 1, start : start + tile]
            head, place = row_places(part, m, group, segment, query.shape[2])
            at = (b, head.unsqueeze(-1), place.unsqueeze(-1), kv)
            logits = gather_rows(queries[:, :, m : m + 1], part).to(wide) @ keys * scale
            if score is not None:
                logits = score(logits, *at)
            logits = logits.masked_fill(~(own & pairs(*at).to(torch.bool)), -torch.inf)
            local = gather_rows(near[:, :, m : m + 1], part)
            total = torch.logaddexp(logits.logsumexp(-1, keepdim=True).float(), local)
            used = torch.arange(start, start + part.shape[-1], device=key.device) < count.unsqueeze(-1)
            # A row with nothing to see, or with a NaN of the model's own, has no say.
            used = used.unsqueeze(-1) & total.isfinite()
            mass += torch.where(used, torch.exp(logits - total), 0.0).sum(-2)
            seeing += used.sum((-2, -1))
            kept += torch.where(used, torch.exp(local - total), 0.0).sum((-2, -1))
        weight = 1.0 / seeing.clamp(min=1)
        masses.append(mass * weight.unsqueeze(-1))
        kepts.append(kept * weight)
    return torch.cat(masses, 2), torch.cat(kepts, 2)

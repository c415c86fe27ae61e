"""How much of a query's attention lies on far keys, from the means of a few keys each."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.mean_pool import block_mean
from omnisparse_flex.masks.tokens.column_mass import CHUNK_LOGITS
from omnisparse_flex.masks.tokens.segments import wide_dtype
from omnisparse_flex.types import ScoreMod


def pooled_lse(
    query: Tensor,
    key: Tensor,
    eligible: Tensor,
    segment: int,
    *,
    block: int,
    pool: int,
    scale: float,
    score: ScoreMod | None,
    first: int = 0,
) -> Tensor:
    """Log-sum-exp over the means of ``pool`` keys in eligible blocks, each counted as ``pool`` keys.

    A lower bound of the keys' own, by convexity.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        eligible: bool (B or 1, Hkv or 1, M, NK).
        segment: Queries per segment.
        block: Keys per block of ``eligible``, a multiple of ``pool``.
        pool: Keys per mean.
        scale: Logit scale.
        score: The model's own change of the logits, or None.
        first: Index of the first segment: the queries are those from there on.

    Returns:
        float32 (float64 for float64 queries) (B, Hq, L); -inf where nothing is eligible.
    """
    batch, heads, q_len, _ = query.shape
    kv_heads = key.shape[1]
    pooled = block_mean(key, pool).to(wide_dtype(query))
    means = pooled.shape[2]
    eligible_means = eligible.repeat_interleave(block // pool, -1)[..., :means]
    centres = (torch.arange(means, device=key.device) * pool + pool // 2).clamp(max=key.shape[2] - 1)
    result = []
    step = max(1, CHUNK_LOGITS // (batch * heads * segment * means)) * segment
    for start in range(0, q_len, step):
        part = query[:, :, start : start + step].to(pooled.dtype).unflatten(1, (kv_heads, -1))
        logits = (part @ pooled.unsqueeze(2).transpose(-1, -2) * scale).flatten(1, 2)
        places = torch.arange(start, start + part.shape[3], device=key.device)
        if score is not None:
            logits = score(logits, *_axes(batch, heads, places + first * segment, centres))
        allowed = eligible_means.index_select(2, places // segment)
        allowed = allowed if allowed.shape[1] == 1 else allowed.repeat_interleave(heads // kv_heads, 1)
        result.append(logits.masked_fill(~allowed, -torch.inf).logsumexp(-1))
    return torch.cat(result, 2) + torch.log(torch.tensor(float(pool), device=key.device))


def _axes(batch: int, heads: int, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    return b, torch.arange(heads, device=q.device).view(1, -1, 1, 1), q.view(1, 1, -1, 1), kv.view(1, 1, 1, -1)

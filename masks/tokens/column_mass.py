"""The exact estimator: how much of their attention the active queries of a segment give to each key."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.tokens.segments import (
    gather_rows,
    max_count,
    row_places,
    segments_of,
    tokens_of_blocks,
    wide_dtype,
)
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
    pairs: MaskMod | None,
    score: ScoreMod | None,
    first: int = 0,
    guess: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax mass that the active rows of each segment give to each key, and to the always-kept ones.

    Exact: every logit of an active row with an eligible key is computed once and dropped.

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
        pairs: The model's own mask; None: it allows every pair of an eligible block.
        score: The model's own change of the logits, or None.
        first: Index of the first segment: the queries are those from there on.
        guess: float32 (B, Hq, L), normalisers to take instead of the rows' own; see ``one_pass``.

    Returns:
        float32 (B, Hkv, M, S) and (B, Hkv, M): means over the active rows that see any key;
        together they sum to 1, or to 0 for a segment without such rows. A key that is not
        finite counts 1, so that it is kept and the model's own NaN shows.

    Source: PAPER "Scores".
    """
    kv_heads, kv_len = key.shape[1:3]
    segment, wide = config.segment_size, wide_dtype(query)
    end = first * segment + query.shape[2]
    # Queries that are not finite do not count in the choice of the others.
    whole = query.isfinite().all(-1, keepdim=True) & (near_lse < torch.inf).unsqueeze(-1)
    broken = ~key.isfinite().all(-1)
    queries = segments_of(torch.where(whole, query, 0.0).to(wide) * scale, kv_heads, segment)
    lses = near_lse.unsqueeze(-1) if guess is None else torch.stack([near_lse, guess], -1)
    near = segments_of(torch.where(whole, lses, -torch.inf), kv_heads, segment)
    is_finite = segments_of(whole, kv_heads, segment)
    keys = torch.where(broken.unsqueeze(-1), 0.0, key).to(wide)
    tile = max(1, min(segment, CHUNK_LOGITS // max(1, keys.shape[0] * kv_heads * kv_len)))
    masses, kepts = [], []
    for m in range(rows.shape[2]):
        is_eligible = tokens_of_blocks(eligible[:, :, m], block, kv_len)
        low, high = _range_of(is_eligible)
        total = torch.zeros((*rows.shape[:2], high - low + 2), device=key.device)
        for start in range(0, max_count(row_count[:, :, m], rows.shape[-1]), tile):
            part = rows[:, :, m : m + 1, start : start + tile]
            used = torch.arange(start, start + part.shape[-1], device=key.device) < row_count[:, :, m, None]
            q, lse, counts = (gather_rows(x[:, :, m : m + 1], part).squeeze(2) for x in (queries, near, is_finite))
            places = row_places(part, first + m, query.shape[1] // kv_heads, segment, end)
            at = _indices(places[0].squeeze(2), places[1].squeeze(2), low, high)
            logits = _logits(q, keys[:, :, low:high], is_eligible[..., None, low:high], at, pairs, score)
            total += _weigh(logits, lse, used & counts.squeeze(-1))
        # Guessed normalisers do not make the shares of a row sum to 1.
        whole_mass = total[..., -1:] if guess is None else total[..., :-1].sum(-1, keepdim=True)
        mean = total[..., :-1] / whole_mass.clamp(min=torch.finfo(total.dtype).tiny)
        mass = F.pad(mean[..., :-1], (low, kv_len - high))
        masses.append(torch.where(broken & is_eligible, 1.0, mass))
        kepts.append(mean[..., -1])
    return torch.stack(masses, 2), torch.stack(kepts, 2)


def _logits(
    query: Tensor, key: Tensor, allowed: Tensor, at: tuple[Tensor, ...], pairs: MaskMod | None, score: ScoreMod | None
) -> Tensor:
    """Scaled queries (B, Hkv, T, D) with keys (B, Hkv, K, D), -inf where not ``allowed`` or not in the model's mask."""
    logits = query @ key.transpose(-1, -2)
    if score is not None:
        logits = score(logits, *at)
    if pairs is not None:
        allowed = allowed & pairs(*at).to(torch.bool)
    if pairs is None and _all(allowed):
        return logits
    return logits.masked_fill(~allowed, -torch.inf)


def _weigh(logits: Tensor, lses: Tensor, used: Tensor) -> Tensor:
    """Sums over the used rows: each key's softmax weight, the local share, and 1 for a row that sees any key.

    One exponential a pair: the rows' own normalisers come in as weights of a product. Where
    ``lses`` (B, Hkv, T, 1 or 2) hold guesses of them, no weight is above 1, however far they are off.
    """
    local = lses[..., 0]
    if lses.shape[-1] == 2:
        used = used & lses[..., 1].isfinite()
        guess = lses[..., 1].masked_fill(~used, torch.inf)
        weights = (logits - guess.unsqueeze(-1)).exp_().clamp_(max=1.0)
        parts = (weights.sum(-2), torch.exp(local - guess).sum(-1, keepdim=True), used.sum(-1, keepdim=True))
        return torch.cat([x.float() for x in parts], -1)
    top = logits.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    heavy = (logits - top).exp_()
    total = torch.logaddexp(top.squeeze(-1) + torch.log(heavy.sum(-1)), local.to(logits.dtype))
    used = used & total.isfinite()
    share = torch.where(used, torch.exp(top.squeeze(-1) - total), 0.0)
    kept = torch.where(used, torch.exp(local - total), 0.0)
    sums = ((share.unsqueeze(-2) @ heavy).squeeze(-2), kept.sum(-1, keepdim=True), used.sum(-1, keepdim=True))
    return torch.cat([x.float() for x in sums], -1)


def _indices(head: Tensor, place: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch, head, query and key indices of a tile's logits (B, Hkv, T, keys)."""
    b = torch.arange(head.shape[0], device=head.device).view(-1, 1, 1, 1)
    return b, head.unsqueeze(-1), place.unsqueeze(-1), torch.arange(low, high, device=head.device)


def _range_of(eligible: Tensor) -> tuple[int, int]:
    """The range of keys that holds every eligible one, where reading it is free (the CPU); else all keys."""
    if eligible.device.type != "cpu":
        return 0, eligible.shape[-1]
    places = eligible.flatten(0, -2).any(0).nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


def _all(x: Tensor) -> bool:
    """Whether all is true, where reading it is free (the CPU); else not known, so not."""
    return x.device.type == "cpu" and bool(x.all())

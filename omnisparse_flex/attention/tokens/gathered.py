"""Attention of packed query rows over gathered keys: of a few segments at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from omnisparse_flex.attention.call import SparseCall
from omnisparse_flex.attention.lse_attention import attend_logits
from omnisparse_flex.masks.tokens.column_mass import CHUNK_LOGITS
from omnisparse_flex.masks.tokens.key_bits import keys_of_bits
from omnisparse_flex.masks.tokens.segments import (
    gather_rows,
    max_count,
    row_places,
    segments_of,
    tokens_of_segments,
    wide_dtype,
)

#: Logits that take what one key of a list takes while it is read from bits.
LIST_COST = 8


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    row_count: Tensor,
    chosen: Tensor,
    key_count: Tensor,
    max_keys: int,
    site: SparseCall,
) -> tuple[Tensor, Tensor]:
    """Attend with the first ``row_count`` rows of each segment over its keys.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        rows: int64 (B, Hkv, M, R), see ``TokenSelection``.
        row_count: int64 (B, Hkv, M).
        chosen: int32 (B or 1, Hkv or 1, M, words), the keys as bits, see ``pack_bits``.
        key_count: int64 (B or 1, Hkv or 1, M), their number.
        max_keys: A bound of it.
        site: Mask, score changes, scale and segment size.

    Returns:
        ``(out, lse)``: (B, Hq, L, Dv) in value's dtype and float32 (float64) (B, Hq, L). A
        query that is not among the rows, or sees none of the keys, gives 0 and -inf.
        Differentiable in query, key and value; the backward computes each step again, so that
        no more than one step's logits, and its list of keys, exist at a time.

    Source: PAPER "token: top-k* tokens, gathered".
    """
    segment, q_len, kv_heads = site.config.segment_size, query.shape[2], key.shape[1]
    queries = segments_of(query, kv_heads, segment)
    chosen, key_count = chosen.expand(*rows.shape[:2], -1, -1), key_count.expand(*rows.shape[:2], -1)
    width, height = max_count(key_count, max_keys), max_count(row_count, rows.shape[-1])
    each = max(width * height, LIST_COST * key.shape[2])
    step = max(1, CHUNK_LOGITS // max(1, rows.shape[0] * rows.shape[1] * each))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    outs, lses = [], []
    for m in range(0, rows.shape[2], step):
        part = slice(m, m + step)
        chunk = (rows[:, :, part, :height], row_count[:, :, part], chosen[:, :, part], key_count[:, :, part])
        inputs = (queries[:, :, part], key, value, *chunk, width, m, q_len, site)
        out, lse = checkpoint(_attend_chunk, *inputs, use_reentrant=False) if learns else _attend_chunk(*inputs)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2).unsqueeze(-1)
    return tokens_of_segments(out, q_len, segment), tokens_of_segments(lse, q_len, segment).squeeze(-1)


def _attend_chunk(
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    row_count: Tensor,
    chosen: Tensor,
    key_count: Tensor,
    width: int,
    first: int,
    q_len: int,
    site: SparseCall,
) -> tuple[Tensor, Tensor]:
    """One step: segments ``first`` and on; queries (B, Hkv, C, R_all, D) in, the same rows out."""
    batch, kv_heads, count, height = rows.shape
    segment, wide = site.config.segment_size, wide_dtype(queries)
    picked, keys = gather_rows(queries, rows), keys_of_bits(chosen, key.shape[2], width)
    k, v = (_gather_keys(x, keys).to(wide) for x in (key, value))
    logits = picked.to(wide) @ k.transpose(-1, -2) * site.scale_for(queries)
    head, place = row_places(rows, first, queries.shape[3] // segment, segment, q_len)
    b = torch.arange(batch, device=rows.device).view(-1, 1, 1, 1, 1)
    at = (b, head.unsqueeze(-1), place.unsqueeze(-1), keys.unsqueeze(-2))
    if site.changes_scores:
        logits = site.plain_score(logits, *at)
    row_used = torch.arange(height, device=rows.device) < row_count.unsqueeze(-1)
    key_used = torch.arange(keys.shape[-1], device=rows.device) < key_count.unsqueeze(-1)
    used = row_used.unsqueeze(-1) & key_used.unsqueeze(-2) & site.mask.pairs(*at).to(torch.bool)
    out, lse = attend_logits(logits, used, v)
    rows_shape = (batch, kv_heads, count, queries.shape[3])
    where = rows.unsqueeze(-1).expand(-1, -1, -1, -1, out.shape[-1])
    full = out.new_zeros((*rows_shape, out.shape[-1])).scatter(3, where, out)
    full_lse = lse.new_full(rows_shape, -torch.inf).scatter(3, rows, lse)
    return full.to(value.dtype), full_lse


def _gather_keys(x: Tensor, keys: Tensor) -> Tensor:
    """Keys (B, H, C, K) of (B, H, S, D): (B, H, C, K, D)."""
    flat = keys.flatten(2, 3).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    gathered: Tensor = x.gather(2, flat).unflatten(2, keys.shape[2:])
    return gathered

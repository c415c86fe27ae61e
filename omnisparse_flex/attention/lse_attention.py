"""Attention of queries that see the same keys, with its log-sum-exp, by which parts are merged."""

from __future__ import annotations

import torch
from torch import Tensor

#: Logits held at once by the plain path.
LOGITS = 1 << 24


def attend_keys(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries that all see the same keys.

    Args:
        query: (B, H, R, D); the query heads of a KV group are rows here, so that keys are read once.
        key: (B, H, S, D).
        value: (B, H, S, Dv).
        allowed: bool (B, H, S) or (B, H, R, S), or None: all.
        scale: Logit scale.

    Returns:
        (B, H, R, Dv), and the log-sum-exp of the logits (B, H, R), -inf where nothing is allowed;
        float32, or float64 for float64 inputs.
    """
    if allowed is None and _has_flash(query, key, value):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = flash(query, key, value, 0.0, False, False, scale=scale)[:2]
        return out.float(), lse
    if allowed is not None and allowed.dim() == 3:
        allowed = allowed[:, :, None]
    rows = max(1, LOGITS // max(1, key.shape[0] * key.shape[1] * key.shape[2]))
    parts = []
    for start in range(0, query.shape[2], rows):
        stop = start + rows
        mask = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, start:stop]
        parts.append(_plain(query[:, :, start:stop], key, value, mask, scale))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over the union of two disjoint sets of keys, from (output, log-sum-exp) of each."""
    (out_a, lse_a), (out_b, lse_b) = first, second
    share = torch.sigmoid(lse_a - lse_b)  # of the first part in the union
    share = torch.where(torch.isinf(lse_a) & torch.isinf(lse_b), 0.0, share)[..., None]
    return out_a * share + out_b * (1 - share)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query.to(exact) * scale) @ key.to(exact).transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(torch.isinf(lse), 0.0, lse)[..., None])
    return weights @ value.to(exact), lse


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= 256
        and key.shape[2] > 0
    )

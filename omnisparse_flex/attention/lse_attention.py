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


def attend_logits(logits: Tensor, allowed: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over allowed pairs times values, and its log-sum-exp; rows without a pair give 0 and -inf, not NaN.

    Args:
        logits: (..., R, S).
        allowed: bool, broadcastable to ``logits``, or None: all.
        value: (..., S, Dv), of the logits' dtype.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if logits.shape[-1] == 0:  # of no keys there is no maximum
        return logits @ value, logits.sum(-1) - torch.inf
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    has_pair = total > 0
    safe = torch.where(has_pair, total, 1.0)
    lse = torch.where(has_pair, top + torch.log(safe), -torch.inf).squeeze(-1)
    return weights @ value / safe, lse


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = (query.to(exact) * scale) @ key.to(exact).transpose(-1, -2)
    return attend_logits(logits, mask, value.to(exact))


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

"""Decode attention over parts of a cache, merged by their log-sum-exps."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omnisparse_flex.cache.kept_keys import Rectangle
from omnisparse_flex.kernels.fallback import guarded

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


def attend_parts(
    query: Tensor, parts: Sequence[Rectangle], tail_key: Tensor, tail_value: Tensor, real: Tensor | None, scale: float,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The latest tokens over a layer's rectangles and its tail, on dense kernels.

    Args:
        query: (B, Hq, L, D), of the last L tokens of the tail.
        parts: Rectangles that hold every KV head once.
        tail_key: (B, Hkv, T, D).
        tail_value: (B, Hkv, T, Dv).
        real: bool (B, T), tokens of the tail that exist, or None: all. A rectangle holds no padding.
        scale: Logit scale.
        sinks: (Hq,), logit of each head's virtual key without a value, or None.

    Returns:
        (B, Hq, L, Dv) in query's dtype.
    """
    batch, heads, count, _ = query.shape
    kv_heads, length = tail_key.shape[1], tail_key.shape[2]
    groups = heads // kv_heads
    rows = query.reshape(batch, kv_heads, groups * count, -1)
    places = torch.arange(length, device=query.device)
    allowed = None
    if count > 1:
        order = places <= places[length - count :, None]  # (L, T)
        allowed = order.repeat(groups, 1)[None, None]
    if real is not None:
        allowed = real[:, None, None] if allowed is None else allowed & real[:, None, None]
    tail = attend_keys(rows, tail_key, tail_value, allowed, scale)
    if sinks is not None:
        # A key without a value: once it belongs to one of the parts, it belongs to the union.
        logit = sinks.to(tail[1].dtype).view(kv_heads, groups).repeat_interleave(count, 1)
        tail = tail[0] * torch.sigmoid(tail[1] - logit)[..., None], torch.logaddexp(tail[1], logit)
    out = rows.new_empty(batch, kv_heads, groups * count, tail_value.shape[3])
    for part in parts:
        columns = slice(None) if len(part.heads) == kv_heads else list(part.heads)
        prefix = attend_keys(rows[:, columns], part.keys, part.values, part.allowed, scale)
        out[:, columns] = merge(prefix, (tail[0][:, columns], tail[1][:, columns])).to(query.dtype)
    return out.view(batch, heads, count, -1)


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


@functools.cache
def token_kernel() -> Callable[..., Tensor | None] | None:
    """``decode_kernel.attend_token`` where Triton is installed, guarded: None once it failed to compile."""
    if importlib.util.find_spec("triton") is None:
        return None
    from omnisparse_flex.kernels.decode_token import attend_token

    return guarded(attend_token, "the decode kernel failed, decoding runs on dense kernels")


def takes_token(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel for one decoded token can run: query (B, Hq, L, D), value (B, Hkv, S, Dv)."""
    dim = query.shape[3]
    fits = 16 <= dim <= 256 and dim & (dim - 1) == 0 and value.shape[3] == dim
    return query.is_cuda and query.shape[2] == 1 and fits and query.dtype != torch.float64

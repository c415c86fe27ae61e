"""The latest tokens over what a layer of the cache keeps: its rectangles and its tail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnisparse_flex.attention.lse_attention import attend_keys, merge
from omnisparse_flex.cache.kept_keys import KeptKeys
from omnisparse_flex.kernels.fallback import fits_kernels

#: The kernel for one decoded token, for ``kernels.fallback.load``.
TOKEN_KERNEL = ("decode_token.attend_token", "the decode kernel failed, decoding runs on dense kernels")


def attend_parts(
    query: Tensor, parts: Sequence[KeptKeys], tail_key: Tensor, tail_value: Tensor, real: Tensor | None, scale: float,
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
        out[:, columns] = merge(*prefix, tail[0][:, columns], tail[1][:, columns]).to(query.dtype)
    return out.view(batch, heads, count, -1)


def takes_token(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel for one decoded token can run: query (B, Hq, L, D), value (B, Hkv, S, Dv)."""
    return query.is_cuda and query.shape[2] == 1 and fits_kernels(query, value)

"""The cheapest estimator: attention between block means of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_pool(
    query: Tensor,
    key: Tensor,
    some: Tensor,
    *,
    scale: float,
    block: int,
    key_block: int,
    adjust: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
    live: Tensor | None = None,
) -> Tensor:
    """Softmax between block means.

    Args, Returns: see ``Scorer``. ``allowed`` is not used: block means resolve no pairs.

    Source: PAPER "Scores"; block means as in most block-sparse prefill methods.
    """
    kv_heads = key.shape[1]
    pooled_q = block_mean(query, block).unflatten(1, (kv_heads, query.shape[1] // kv_heads))
    pooled_k = block_mean(key, key_block, live).unsqueeze(2)
    logits = (for_products(pooled_q) @ for_products(pooled_k).transpose(-1, -2)).float().flatten(1, 2) * scale
    if adjust is not None:
        logits = adjust(logits)
    if live is not None:
        logits = logits + (live_counts(live, key_block) / key_block).log()[:, None, None]
    mass = torch.softmax(logits.masked_fill(~some, float("-inf")), dim=-1)
    return mass.masked_fill(~some, 0.0)


def for_products(x: Tensor) -> Tensor:
    """What products are taken of: unscaled ones may exceed float16's 65,504, where attention's own are float32."""
    return x.float() if x.dtype == torch.float16 else x


def for_exact_products(x: Tensor) -> Tensor:
    """What the products of exact rows are taken of: attention's own logits are never rounded to a half type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def live_counts(live: Tensor, block: int) -> Tensor:
    """Live keys of each block: float32 (B, NB) of bool (B, S)."""
    count = (live.shape[1] + block - 1) // block
    padded: Tensor = F.pad(live.to(torch.float32), (0, count * block - live.shape[1]))
    counts: Tensor = padded.unflatten(1, (count, block)).sum(2)
    return counts


def block_mean(x: Tensor, block: int, live: Tensor | None = None) -> Tensor:
    """Mean over consecutive blocks of tokens, the ragged last one included: (B, H, N, D) -> (B, H, NB, D).

    ``live``: bool (B, N), the tokens that count; a block without any has mean 0. None: all.
    """
    if live is not None:
        alive = torch.where(live[:, None, :, None], x, 0.0)
        share = (live_counts(live, block) / live_counts(torch.ones_like(live), block)).clamp(min=1 / block)
        return (block_mean(alive, block).to(torch.float32) / share[:, None, :, None]).to(x.dtype)
    length = x.shape[2]
    count = (length + block - 1) // block
    if isinstance(length, int) and length % block == 0:
        mean: Tensor = x.unflatten(2, (count, block)).mean(3, dtype=torch.float32)
        return mean.to(x.dtype)
    padded: Tensor = F.pad(x, (0, 0, 0, count * block - length))
    sizes = (length - torch.arange(count, device=x.device) * block).clamp(max=block)
    sums: Tensor = padded.unflatten(2, (count, block)).sum(3, dtype=torch.float32)
    return (sums / sizes[:, None]).to(x.dtype)

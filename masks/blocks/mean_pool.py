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
    adjust: Callable[[Tensor], Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Softmax between block means.

    Args, Returns: see ``Scorer``. ``allowed`` is not used: block means resolve no pairs.

    Source: PAPER "Scores"; block means as in most block-sparse prefill methods.
    """
    kv_heads = key.shape[1]
    pooled_q = block_mean(query, block).unflatten(1, (kv_heads, query.shape[1] // kv_heads))
    pooled_k = block_mean(key, key_block).unsqueeze(2)
    logits = (pooled_q @ pooled_k.transpose(-1, -2)).float().flatten(1, 2) * scale
    if adjust is not None:
        logits = adjust(logits)
    mass = torch.softmax(logits.masked_fill(~some, float("-inf")), dim=-1)
    return mass.masked_fill(~some, 0.0)


def block_mean(x: Tensor, block: int) -> Tensor:
    """Mean over consecutive blocks of tokens, the ragged last one included: (B, H, N, D) -> (B, H, NB, D)."""
    length = x.shape[2]
    count = (length + block - 1) // block
    if isinstance(length, int) and length % block == 0:
        mean: Tensor = x.unflatten(2, (count, block)).mean(3, dtype=torch.float32)
        return mean.to(x.dtype)
    padded: Tensor = F.pad(x, (0, 0, 0, count * block - length))
    sizes = (length - torch.arange(count, device=x.device) * block).clamp(max=block)
    sums: Tensor = padded.unflatten(2, (count, block)).sum(3, dtype=torch.float32)
    return (sums / sizes[:, None]).to(x.dtype)

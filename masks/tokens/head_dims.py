"""The dimensions of a head with the largest products, to which scores can be confined (``scoring_dims``)."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.masks.tokens.segments import wide_dtype


def top_head_dims(query: Tensor, key: Tensor, choices: int, dims: int) -> Tensor:
    """Coordinates by the product of their mean squares in queries and keys.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        choices: Heads that choose: all KV heads, or all query heads.
        dims: How many of the D.

    Returns:
        int64 (B, choices, dims), ascending. Tokens that are not finite do not count; of equal coordinates the first
        are taken.

    Our choice: unlike leading directions, coordinates need no eigenvectors, whose computation waits for the device;
    measured in ``benchmarks/quality`` (rows "dims32"). All tokens of the call count, later ones too.
    """
    return top_dims_of(_squares(query), _squares(key), choices, dims)


def top_dims_of(of_query: Tensor, of_key: Tensor, choices: int, dims: int) -> Tensor:
    """``top_head_dims`` from sums of squares over tokens.

    Args:
        of_query: float32 or float64 (B, Hq, D).
        of_key: float32 or float64 (B, Hkv, D).
        choices: Heads that choose: all KV heads, or all query heads.
        dims: How many of the D.

    Returns:
        int64 (B, choices, dims), ascending.
    """
    products = of_query.unflatten(1, (choices, -1)).sum(2) * of_key.repeat_interleave(choices // of_key.shape[1], 1)
    best = torch.sort(products, dim=-1, descending=True, stable=True).indices[..., :dims]
    columns: Tensor = best.sort(-1).values
    return columns


def gather_dims(x: Tensor, columns: Tensor) -> Tensor:
    """The chosen coordinates (B, Hc, dims) of (B, H, N, D), Hc dividing H; tokens that are not finite stay so."""
    dims = columns.repeat_interleave(x.shape[1] // columns.shape[1], 1).unsqueeze(2)
    narrow = x.gather(3, dims.expand(-1, -1, x.shape[2], -1))
    return narrow.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)


def _squares(x: Tensor) -> Tensor:
    """Sums of squares of finite tokens, (B, H, N, D) -> (B, H, D)."""
    whole = torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0)
    squares: Tensor = torch.linalg.vector_norm(whole, dim=2, dtype=wide_dtype(x)).square()
    return squares

"""Rows of attention, and what every estimate of them is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: ``rows(start, stop)``: float32 (B, Hq, stop - start, stop), each row the estimated mass on keys 0..stop-1.
Rows = Callable[[int, int], Tensor]


def logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Float32 (B, Hq, R, M) of (B, Hq, R, D) queries and (B, Hkv, M, D) keys."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).float() * scale


def causal(start: int, stop: int, device: torch.device) -> Tensor:
    """Bool (stop - start, stop): query ``start + r`` sees keys up to itself."""
    return torch.arange(start, stop, device=device)[:, None] >= torch.arange(stop, device=device)


def softmax_rows(scores: Tensor, start: int, stop: int) -> Tensor:
    """Causal softmax of (B, Hq, stop - start, stop) logits."""
    return torch.softmax(scores.masked_fill_(~causal(start, stop, scores.device), float("-inf")), dim=-1)

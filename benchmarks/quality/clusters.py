"""K-means of keys per KV head: tokens that any query treats alike, wherever they stand."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Keys by content.

    Attributes:
        centre: (B, Hkv, C, D), means.
        variance: (B, Hkv, C, D), of each dimension within the cluster.
        member: int64 (B, Hkv, N), each key's cluster.
    """

    centre: Tensor
    variance: Tensor
    member: Tensor


def cluster_keys(key: Tensor, count: int, rounds: int) -> Clusters:
    """Lloyd's algorithm from evenly spaced keys.

    Args:
        key: (B, Hkv, N, D).
        count: C, number of clusters.
        rounds: Assignments made.

    Returns:
        The clusters. Our choice: evenly spaced keys as the start, because neighbours resemble each other; a cluster
        that loses all keys keeps its centre.
    """
    centre = key[:, :, :: key.shape[2] // count][:, :, :count]
    for _ in range(rounds):
        # Nearest centre: maximal k·c - |c|²/2. (k·c alone would favour long centres.)
        member = (key @ centre.transpose(-1, -2) - centre.square().sum(-1).unsqueeze(2) / 2).argmax(-1)
        centre = torch.where(_sums(torch.ones_like(key), member, count) > 0, _means(key, member, count), centre)
    variance = (_means(key.square(), member, count) - _means(key, member, count).square()).clamp(min=0)
    return Clusters(centre, variance, member)


def _means(x: Tensor, member: Tensor, count: int) -> Tensor:
    return _sums(x, member, count) / _sums(torch.ones_like(x), member, count).clamp(min=1)


def _sums(x: Tensor, member: Tensor, count: int) -> Tensor:
    total = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=x.dtype, device=x.device)
    return total.scatter_add(2, member.unsqueeze(-1).expand_as(x), x)

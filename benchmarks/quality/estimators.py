"""Estimates of attention rows, each as a function of a range of queries.

Every estimator answers the same question, "what would the softmax rows of these queries be?", so that breadth,
column mass of a segment and block mass all follow from its answer. Here rows are written out at token resolution,
whatever the estimator's own: the lab measures quality, and prices come from ``costs``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quality.clusters import cluster_keys
from benchmarks.quality.one_pass import OnePass
from benchmarks.quality.rows import Rows, logits, softmax_rows


def exact(query: Tensor, key: Tensor, scale: float) -> Rows:
    """The true rows."""
    return lambda start, stop: softmax_rows(logits(query[:, :, start:stop], key[:, :, :stop], scale), start, stop)


def fp8(query: Tensor, key: Tensor, scale: float) -> Rows:
    """True rows of queries and keys rounded to float8_e4m3."""
    return exact(*(x.to(torch.float8_e4m3fn).to(x.dtype) for x in (query, key)), scale)


def int4(query: Tensor, key: Tensor, scale: float) -> Rows:
    """True rows of queries and keys rounded to 15 levels, one step size per token."""
    steps = [x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 7 for x in (query, key)]
    return exact(*((x / s).round() * s for x, s in zip((query, key), steps, strict=True)), scale)


def pca(query: Tensor, key: Tensor, scale: float, *, dims: int) -> Rows:
    """True rows within the ``dims`` leading directions of the (centred) keys of each KV head.

    Centring the keys shifts all logits of a query alike, so it changes no row.
    """
    centred = key - key.mean(2, keepdim=True)
    basis = torch.linalg.eigh((centred.transpose(-1, -2) @ centred).float())[1][..., -dims:].to(key.dtype)
    narrow = (query.unflatten(1, (key.shape[1], -1)) @ basis.unsqueeze(2)).flatten(1, 2)
    return exact(narrow, centred @ basis, scale)


def pooled(query: Tensor, key: Tensor, scale: float, *, queries: int = 1, keys: int = 1) -> Rows:
    """Rows between means of ``queries`` and of ``keys`` consecutive tokens; ``mean_pool`` has both at 64 or 128."""
    mean_q, mean_k = (
        x.unflatten(2, (-1, size)).mean(3).repeat_interleave(size, 2) for x, size in ((query, queries), (key, keys))
    )
    return exact(mean_q, mean_k, scale)


def antidiagonal(query: Tensor, key: Tensor, scale: float, *, stride: int) -> Rows:
    """Rows of logits averaged over the antidiagonal of each ``stride`` x ``stride`` tile.

    Source: XAttention, arXiv 2503.16428: one product of length ``stride * D`` per tile.
    """
    folded_q = query.unflatten(2, (-1, stride)).flip(3).flatten(3)
    folded_k = key.unflatten(2, (-1, stride)).flatten(3)

    def rows(start: int, stop: int) -> Tensor:
        tiles = logits(folded_q[:, :, start // stride : stop // stride], folded_k[:, :, : stop // stride], scale)
        spread = (tiles / stride).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        return softmax_rows(spread, start, stop)

    return rows


def probe(query: Tensor, key: Tensor, scale: float, *, every: int) -> Rows:
    """True rows of each ``every``-th query, standing in for the queries before it (SampleAttention, ZipVL)."""
    return exact(query[:, :, every - 1 :: every].repeat_interleave(every, 2), key, scale)


def clustered(query: Tensor, key: Tensor, scale: float, *, size: int, spread: bool = False, rounds: int = 3) -> Rows:
    """Rows between every query and key *clusters* of ``size`` tokens on average: pooling by content, not by place.

    Args:
        query: (B, Hq, N, D).
        key: (B, Hkv, N, D).
        scale: Logit scale.
        size: Mean tokens per cluster.
        spread: Add half the variance of the cluster's logits (second order of its log-sum-exp).
        rounds: Of k-means.
    """
    found = cluster_keys(key, key.shape[2] // size, rounds)
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    member = found.member.repeat_interleave(groups, 1).unsqueeze(2)

    def rows(start: int, stop: int) -> Tensor:
        part = query[:, :, start:stop]
        scores = logits(part, found.centre, scale)
        if spread:
            scores += logits(part.square(), found.variance, 0.5 * scale**2)
        index = member[..., :stop].expand(-1, heads, stop - start, -1)
        return softmax_rows(scores.gather(-1, index), start, stop)

    return rows


ESTIMATORS: dict[str, Callable[..., Rows]] = {
    "exact": exact,
    "fp8": fp8,
    "int4": int4,
    "pca": pca,
    "pooled": pooled,
    "antidiagonal": antidiagonal,
    "probe": probe,
    "clustered": clustered,
    "one_pass": OnePass,
}

"""Estimates of attention rows, each as a function of a range of queries.

Every estimator answers the same question, "what would the softmax rows of these queries be?", so that breadth,
column mass of a segment and block mass all follow from its answer. Here rows are written out at token resolution,
whatever the estimator's own: the lab measures quality, and prices come from ``costs``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quality.clusters import cluster_keys

#: One query in so many leads its segment: as in the library, it is active whatever it looks at.
LEADER = 16
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


def _without(query: Tensor, key: Tensor, dims: int) -> Tensor:
    """The queries with zeros at the ``loudest`` coordinates, (B, Hq, N, D)."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    energy = grouped.float().square().mean((2, 3)) * key.float().square().mean(2)
    index = energy.topk(dims, sorted=False).indices[:, :, None, None]
    return grouped.scatter(-1, index.expand(*grouped.shape[:-1], dims), 0.0).flatten(1, 2)


def loudest(query: Tensor, key: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The ``dims`` coordinates of each KV head that say most: by the product of their mean squares in queries and keys.

    Unlike the leading directions of ``pca`` they need no eigenvectors, whose computation waits for the device.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    energy = grouped.float().square().mean((2, 3)) * key.float().square().mean(2)  # (B, Hkv, D)
    index = energy.topk(dims, sorted=False).indices[:, :, None]
    narrow = grouped.gather(-1, index[:, :, None].expand(*grouped.shape[:-1], dims)).flatten(1, 2)
    return narrow, key.gather(-1, index.expand(*key.shape[:-1], dims))


class OnePass:
    """Rows of one pass over the pairs: their normaliser is guessed before it, not found by a pass of its own.

    The guess is the log-sum-exp of the local part, which part 1 of the token path has anyway, joined
    with that of the means of ``pool`` keys beyond it. It only weighs the rows of a segment against one another.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        *,
        sinks: int = 64,
        window: int = 256,
        pool: int = 16,
        bits8: bool = True,
        dims: int = 0,
        scatter: bool = False,
        early: bool = False,
        leaders: int = 0,
        segment: int = 256,
        together: bool = False,
        rest: bool = False,
        level: bool = False,
    ) -> None:
        """Begin.

        Args:
            query: (B, Hq, N, D).
            key: (B, Hkv, N, D).
            scale: Logit scale.
            sinks: Keys of the local part at the start.
            window: Keys of the local part at the end, the query's own included.
            pool: Keys to a mean.
            bits8: Round queries and keys to float8_e4m3.
            dims: Only as many coordinates (``loudest``) in the pass; 0: all.
            scatter: The guess knows the variance of each mean's keys too, coordinate by coordinate: their log-sum-exp
                to second order. Means alone are far below what a few loud keys give.
            early: Who is lazy is judged by the guess, before the pass, which is then made for active queries alone.
            leaders: The guess knows, instead of means, as many keys of each segment: those that every
                ``LEADER``-th query looks at most, by scores of its own. Early, too. 0: none.
            segment: Queries that share such keys.
            together: So do the heads of a group.
            rest: The coordinates that the pass leaves out count by the means of their pool.
            level: The guess is raised, by head and stretch of rows, by what the leaders' own scores are above theirs.
        """
        self.query, self.key, self.scale = query, key, scale
        self.sinks, self.window, self.pool, self.dims, self.early = sinks, window, pool, dims, early or leaders > 0
        self.leaders, self.segment, self.together, self.level = leaders, segment, together, level
        pools = key.unflatten(2, (-1, pool))
        self.means = pools.mean(3)
        self.variances = pools.var(3, correction=0) if scatter else None
        narrow = loudest(query, key, dims) if dims else (query, key)
        self.rest = _without(query, key, dims) if rest else None
        self.narrow = [x.to(torch.float8_e4m3fn).to(x.dtype) if bits8 else x for x in narrow]

    def __call__(self, start: int, stop: int) -> Tensor:
        """The rows."""
        near, seen = self._near(start, stop)
        narrow_query, narrow_key = self.narrow
        scores = logits(narrow_query[:, :, start:stop], narrow_key[:, :, :stop], self.scale)
        if self.rest is not None:
            few = logits(self.rest[:, :, start:stop], self.means[:, :, : -(-stop // self.pool)], self.scale)
            scores = scores + few.repeat_interleave(self.pool, -1)[..., :stop]
        if self.dims:  # the local part is computed whole anyway
            scores = torch.where(near, self._whole(start, stop), scores)
        guess = torch.logaddexp(scores.masked_fill(~near, float("-inf")).logsumexp(-1), self.far(start, stop))
        # No share is above 1, however far the guess is off.
        return torch.exp(scores - guess.unsqueeze(-1)).clamp_(max=1.0).masked_fill_(~seen, 0.0)

    def breadth(self, start: int, stop: int) -> Tensor:
        """Share of each row's mass that the guess sees beyond the local part, (B, Hq, stop - start)."""
        near = self._whole(start, stop).masked_fill(~self._near(start, stop)[0], float("-inf")).logsumexp(-1)
        return torch.sigmoid(self.far(start, stop) - near)

    def far(self, start: int, stop: int) -> Tensor:
        """Log-sum-exp of each row's keys beyond the local part, as far as it is known, (B, Hq, stop - start)."""
        if self.leaders:
            return self._looked_at(start, stop)
        far = self._far(start, stop)
        return far + self._too_low(far[:, :, ::LEADER], start, stop) if self.level else far

    def _too_low(self, guess: Tensor, start: int, stop: int) -> Tensor:
        """What the leaders' guesses lack, the mean by head: (B, Hq, 1)."""
        near, seen = (x[::LEADER] for x in self._near(start, stop))
        narrow_query, narrow_key = self.narrow
        scores = logits(narrow_query[:, :, start:stop:LEADER], narrow_key[:, :, :stop], self.scale)
        lacks = scores.masked_fill(~(seen & ~near), float("-inf")).logsumexp(-1) - guess
        known = guess.isfinite()
        return torch.where(known, lacks, 0.0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)

    def _near(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        q, k = torch.arange(start, stop, device=self.key.device)[:, None], torch.arange(stop, device=self.key.device)
        seen = k <= q
        return ((q - k < self.window) | (k < self.sinks)) & seen, seen

    def _whole(self, start: int, stop: int) -> Tensor:
        return logits(self.query[:, :, start:stop], self.key[:, :, :stop], self.scale)

    def _far(self, start: int, stop: int) -> Tensor:
        """Log-sum-exp of the keys beyond the local part, by their means."""
        q, own = torch.arange(start, stop, device=self.key.device)[:, None], self.query[:, :, start:stop]
        firsts = torch.arange(-(-stop // self.pool), device=self.key.device) * self.pool
        far = (firsts >= self.sinks) & (firsts + self.pool <= q - self.window + 1)
        pooled = logits(own, self.means[:, :, : len(firsts)], self.scale)
        if self.variances is not None:
            pooled = pooled + logits(own.square(), self.variances[:, :, : len(firsts)], 0.5 * self.scale**2)
        return pooled.masked_fill(~far, float("-inf")).logsumexp(-1) + math.log(self.pool)

    def _looked_at(self, start: int, stop: int) -> Tensor:
        """The same, by the keys that the leaders of each segment look at most."""
        near, seen = self._near(start, stop)
        whole = self._whole(start, stop)
        leads = slice(None, None, LEADER)
        local = whole[:, :, leads].masked_fill(~near[leads], float("-inf")).logsumexp(-1)
        guess = torch.logaddexp(local, self._far(start, stop)[:, :, leads]).unsqueeze(-1)
        narrow_query, narrow_key = self.narrow
        scores = logits(narrow_query[:, :, start:stop][:, :, leads], narrow_key[:, :, :stop], self.scale)
        share = torch.exp(scores - guess).clamp_(max=1.0).masked_fill_(~(seen & ~near)[leads], 0.0)
        mass = share.unflatten(2, (-1, self.segment // LEADER)).sum(3)
        if self.together:
            mass = mass.unflatten(1, (self.key.shape[1], -1)).sum(2)
        few = mass.topk(min(self.leaders, stop), dim=-1).indices
        listed = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, few, True)
        listed = listed.repeat_interleave(whole.shape[1] // listed.shape[1], 1).repeat_interleave(self.segment, 2)
        return whole.masked_fill(~(listed & seen & ~near), float("-inf")).logsumexp(-1)


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

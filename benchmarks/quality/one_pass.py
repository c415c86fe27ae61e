"""Rows of one pass over the pairs, and the ways to know beforehand which queries it is made for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.quality.rows import logits

#: One query in so many leads its segment: as in the library, it is active whatever it looks at.
LEADER = 16


def top_head_dims(query: Tensor, key: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The ``dims`` coordinates of each KV head that say most: by the product of their mean squares in queries and keys.

    Unlike the leading directions of ``pca`` they need no eigenvectors, whose computation waits for the device.
    """
    grouped, index = _loud(query, key, dims)
    narrow = grouped.gather(-1, index.unsqueeze(2).expand(*grouped.shape[:-1], dims)).flatten(1, 2)
    return narrow, key.gather(-1, index.expand(*key.shape[:-1], dims))


def _without(query: Tensor, key: Tensor, dims: int) -> Tensor:
    """The queries with zeros at the ``top_head_dims`` coordinates, (B, Hq, N, D)."""
    grouped, index = _loud(query, key, dims)
    return grouped.scatter(-1, index.unsqueeze(2).expand(*grouped.shape[:-1], dims), 0.0).flatten(1, 2)


def _loud(query: Tensor, key: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Queries by group, (B, Hkv, G, N, D), and the loudest coordinates, int64 (B, Hkv, 1, dims)."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    energy = grouped.float().square().mean((2, 3)) * key.float().square().mean(2)  # (B, Hkv, D)
    return grouped, energy.topk(dims, sorted=False).indices.unsqueeze(2)


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
            dims: Only as many coordinates (``top_head_dims``) in the pass; 0: all.
            scatter: The guess knows the variance of each mean's keys too, coordinate by coordinate: their log-sum-exp
                to second order. Means alone are far below what a few loud keys give.
            early: Who is lazy is judged by the guess, before the pass, which is then made for active queries alone.
            leaders: The guess knows, instead of means, as many keys of each segment: those that every
                ``LEADER``-th query looks at most, by scores of its own. Early, too. 0: none.
            segment: Queries that share such keys.
            rest: The coordinates that the pass leaves out count by the means of their pool.
            level: The guess is raised, by head and stretch of rows, by what the leaders' own scores are above theirs.
        """
        self.query, self.key, self.scale = query, key, scale
        self.sinks, self.window, self.pool, self.dims, self.early = sinks, window, pool, dims, early or leaders > 0
        self.leaders, self.segment, self.level = leaders, segment, level
        pools = key.unflatten(2, (-1, pool))
        self.means = pools.mean(3)
        self.variances = pools.var(3, correction=0) if scatter else None
        narrow = top_head_dims(query, key, dims) if dims else (query, key)
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
        few = mass.topk(min(self.leaders, stop), dim=-1).indices
        listed = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, few, True)
        listed = listed.repeat_interleave(self.segment, 2)
        return whole.masked_fill(~(listed & seen & ~near), float("-inf")).logsumexp(-1)

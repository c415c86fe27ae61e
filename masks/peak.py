"""The peak rule: a block is fetched if one of the query block's sampled rows gives it at least that row's threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.masks.layout import Layout
from omnisparse_flex.masks.mean_pool import block_mean
from omnisparse_flex.masks.opaque import OpaqueMask
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.peak_rows import (
    PHASES,
    ROWS,
    Keys,
    LiveRows,
    exact_logs,
    pooled_shares,
    row_logits,
    row_of,
)

#: A row's threshold is at most so many times the mean share of a key block that it sees, for blocks of 64 keys
#: (twice that for 128). Our choice: SmolLM2's loss then stays within 0.3 points from 2K to 8K tokens.
KAPPA = 2.0
#: Thresholds that are tried for the floor, each so much lower than the one before.
FLOOR_STEPS, FLOOR_RATIO = 12, 2.0**-0.5
#: Exact rows are computed where block means give a pair at least this part of the threshold. Our choice: with 1/8
#: the loss of SmolLM2 at 8K is that of all pairs at 0.61 to 0.65 of them, with 1/4 0.3 points more at 0.5.
CANDIDATE = 1 / 8
#: The row of a block whose normaliser is exact, for the reported recall.
WITNESS = ROWS - 1


class PeakRule(NamedTuple):
    """The numbers of the rule.

    Attributes:
        min_peak: Share of a row that is a peak, a number or 0-d tensor; 0 keeps everything.
        floor: Share of a row's mass that the threshold must leave it, likewise; from 1 on, everything is kept.
    """

    min_peak: Tensor | float
    floor: Tensor | float


class Peaks(NamedTuple):
    """What the rule says.

    Attributes:
        chosen: bool (B, Hq, NQ, NK), eligible blocks that a row has a peak in.
        recall: float32 (B, Hq, NQ), the share of one exact row of each block that the chosen and the forced
            blocks hold; 1 where no row sees a key.
    """

    chosen: Tensor
    recall: Tensor


def find_peaks(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    live: LiveRows,
    rule: PeakRule,
    *,
    scale: float,
    key_block: int,
    first_block: Tensor | int,
    last_rows: int,
    score: Callable[..., Tensor] | None,
    mask: MaskProgram | OpaqueMask,
) -> Peaks:
    """Apply the rule to every query block, each head and row for itself.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        layout: The site's maps.
        live: The rows to sample from.
        rule: Its numbers.
        scale: Logit scale.
        key_block: Tokens of a key block.
        first_block: Number of the first query block, in positions of the keys.
        last_rows: Rows of exact logits in all for the last two query blocks, at least ``ROWS`` for each.
        score: The model's own change of a logit, ``(logits, b, h, q, kv) -> logits``, or None.
        mask: The model's own mask.

    Returns:
        The blocks and the recall. Later queries and keys, other heads and other batch rows have no say.

    Source: our choice. Dropping a block costs about the square of what a row loses, so that the largest share that
    any row gives it decides; sampled exact rows as in SampleAttention, arXiv 2406.15486.
    """
    keys = Keys(key, block_mean(key, key_block), key_block)
    site = _Site(query, keys, layout, live, rule, scale, first_block, score, mask)
    chosen, recall = _by_rows(site, PHASES[0], witness=True)
    for phase in PHASES[1 : extra_phases(last_rows) + 1]:
        more, _ = _by_rows(_last_blocks(site), phase, witness=False)
        start = chosen.shape[2] - more.shape[2]
        chosen = torch.cat((chosen[:, :, :start], chosen[:, :, start:] | more), 2)
    return Peaks(chosen, recall)


def extra_phases(last_rows: int) -> int:
    """Further sets of ``ROWS`` rows that each of the last two blocks gets."""
    return min(max(-(-last_rows // 2 // ROWS) - 1, 0), len(PHASES) - 1)


class _Site(NamedTuple):
    query: Tensor
    keys: Keys
    layout: Layout
    live: LiveRows
    rule: PeakRule
    scale: float
    first_block: Tensor | int
    score: Callable[..., Tensor] | None
    mask: MaskProgram | OpaqueMask


#: Query blocks at the end that get further rows: a question may straddle the edge between two.
LAST_BLOCKS = 2


def _last_blocks(site: _Site) -> _Site:
    start = max(site.layout.some.shape[2] - LAST_BLOCKS, 0)
    layout = Layout(*(x[:, :, start:] for x in site.layout))
    live = LiveRows(*(x[:, :, start:] for x in site.live))
    return site._replace(layout=layout, live=live, first_block=site.first_block + start)


def _by_rows(site: _Site, phase: int, *, witness: bool) -> Peaks:
    """The rule by one set of rows."""
    places = [row_of(site.live, r, phase, site.query.shape[1], site.first_block) for r in range(ROWS)]
    sees = (site.live.count > 0).unsqueeze(-1)
    eligible, forced = site.layout.eligible & sees, site.layout.forced & sees
    base = _base_threshold(site)
    pooled, candidates = [], ~site.layout.full
    for place in places:
        share = _pooled(site, place)
        candidates = candidates | (share[0] >= (base * CANDIDATE).unsqueeze(-1))
        pooled.append(share)
    own = forced | (eligible & candidates)
    chosen, logs = torch.zeros_like(own), None
    for place, (share, total) in zip(places, pooled, strict=True):
        logs = exact_logs(site.query, site.keys, place, site.scale, site.score, site.mask.pairs)
        shares = _row_shares(logs, own, share, total)
        chosen = chosen | (shares >= _threshold(shares, forced, base, site.rule).unsqueeze(-1))
    chosen = eligible & own & chosen
    chosen = torch.where(_keeps_all(site.rule), eligible, chosen)
    if not witness or logs is None:
        return Peaks(chosen, base)
    exact = torch.softmax(logs, -1)
    kept = (exact * (chosen | forced)).sum(-1)
    return Peaks(chosen, torch.where(torch.isfinite(kept) & sees.squeeze(-1), kept, 1.0))


def _pooled(site: _Site, place: Tensor) -> tuple[Tensor, Tensor]:
    """A row's softmax between block means, 0 outside the blocks that it sees wholly; and its log-sum-exp."""
    logits = row_logits(site.query, site.keys.means, place, site.scale)
    if site.score is not None:
        blocks = torch.arange(site.keys.means.shape[2], device=logits.device)
        b = torch.arange(logits.shape[0], device=logits.device).view(-1, 1, 1, 1)
        h = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
        centre = (blocks * site.keys.block + site.keys.block // 2).clamp(max=site.keys.vectors.shape[2] - 1)
        logits = site.score(logits, b, h, place.unsqueeze(-1), centre.view(1, 1, 1, -1))
    size = torch.full((), site.keys.block, dtype=torch.float32, device=logits.device)
    return pooled_shares(logits + size.log(), site.layout.full)


def _row_shares(logs: Tensor, own: Tensor, pooled: Tensor, total: Tensor) -> Tensor:
    """A row's softmax over the blocks computed exactly; the others join its normaliser by their means."""
    exact = logs.masked_fill(~own, float("-inf"))
    others = pooled.masked_fill(own, 0.0).sum(-1).log() + total.nan_to_num(neginf=0.0)
    normal = torch.logaddexp(torch.logsumexp(exact, -1), others)
    return torch.exp(exact - normal.unsqueeze(-1)).nan_to_num(0.0)


def _base_threshold(site: _Site) -> Tensor:
    """The least of ``min_peak`` and what the number of seen key blocks allows: float32 (B or 1, Hq or 1, NQ)."""
    kappa = KAPPA
    seen = site.layout.some.sum(-1).clamp(min=1)
    return torch.minimum(kappa / seen, torch.as_tensor(site.rule.min_peak, dtype=torch.float32, device=seen.device))


def _threshold(shares: Tensor, forced: Tensor, base: Tensor, rule: PeakRule) -> Tensor:
    """The highest threshold, from ``base`` down, that leaves a row its floor; 0 if none does."""
    always = (shares * forced).sum(-1)
    far = shares.masked_fill(forced, 0.0)
    found = torch.zeros_like(always)
    for step in reversed(range(FLOOR_STEPS)):
        tried = base * FLOOR_RATIO**step
        reached = always + (far * (far >= tried.unsqueeze(-1))).sum(-1) >= rule.floor
        found = torch.where(reached, tried, found)
    return found


def _keeps_all(rule: PeakRule) -> Tensor:
    """Whether a number says that everything stays; of a 0-d tensor without a look at it."""
    return (torch.as_tensor(rule.min_peak) <= 0) | (torch.as_tensor(rule.floor) >= 1)

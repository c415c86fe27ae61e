"""The peak rule: a block is fetched if one of the query block's sampled rows gives it at least that row's threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks.peak_rows import (
    PHASES,
    ROWS,
    Keys,
    LiveRows,
    exact_logs,
    pooled_shares,
    row_logits,
    row_of,
)
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.expr.opaque import OpaqueMask

#: A row's threshold is at most so many times the mean share of the key blocks that it sees. Our choice: with a floor
#: of 0.6, SmolLM2 then loses 0.75, 0.98 and 0.76 % perplexity at 2K, 4K and 8K tokens.
KAPPA = 2.0
#: The threshold that leaves a row its floor is a power of 2, this one the lowest; else everything that was multiplied
#: stays. Our choice: powers of the root of 2 give the same perplexity at an equal kept share.
LOWEST = -16
#: Exact rows are computed where block means give a pair at least this part of the threshold. Our choice: with 1/8
#: the loss of SmolLM2 at 8K is that of all pairs at 0.61 to 0.65 of them, with 1/4 0.3 points more at 0.5.
CANDIDATE = 1 / 8


class Maps(NamedTuple):
    """What of a site's layout the rule reads; bool (B or 1, Hq or 1, NQ, NK) each.

    Attributes:
        full: Blocks that the model's mask allows wholly.
        some: Blocks with possibly allowed pairs.
        forced: Blocks that are kept anyway.
    """

    full: Tensor
    some: Tensor
    forced: Tensor


class PeakSite(NamedTuple):
    """One call of the rule.

    Attributes:
        query: (B, Hq, L, D).
        keys: What rows look at.
        maps: The site's maps.
        live: The rows to sample from.
        base: float32 (B or 1, Hq or 1, NQ), the highest threshold; see ``base_threshold``.
        floor: Share of a row's mass that its threshold must leave it, a number or 0-d tensor.
        scale: Logit scale.
        first_block: Number of the first query block, in positions of the keys.
        score: The model's own change of a logit, ``(logits, b, h, q, kv) -> logits``, or None.
        mask: The model's own mask.
    """

    query: Tensor
    keys: Keys
    maps: Maps
    live: LiveRows
    base: Tensor
    floor: Tensor | float
    scale: float
    first_block: Tensor | int
    score: Callable[..., Tensor] | None
    mask: IndexMask | OpaqueMask


class Peaks(NamedTuple):
    """What the rule says.

    Attributes:
        chosen: bool (B, Hq, NQ, NK), blocks beside the forced ones that a row has a peak in.
        recall: float32 (B, Hq, NQ), the share of one exact row of each block that the chosen and the forced
            blocks hold; 1 where no row sees a key.
        scored: float32 (B, Hq, NQ), key blocks that were multiplied exactly, with the group's other heads.
    """

    chosen: Tensor
    recall: Tensor
    scored: Tensor


def find_peaks(site: PeakSite, last_rows: int, *, pairs: int | None = None) -> Peaks:
    """Apply the rule to every query block, each head and row for itself.

    Args:
        site: The call.
        last_rows: Rows of exact logits in all for the last two query blocks, at least ``ROWS`` for each.
        pairs: Elements of a tensor of a row of some query blocks against all keys, at most; None: all blocks at once.

    Returns:
        The blocks, the recall and the cost. Later queries and keys, other heads and other batch rows have no say.

    Source: our choice. Dropping a block costs about the square of what a row loses, so that the largest share that
    any row gives it decides; sampled exact rows as in SampleAttention, arXiv 2406.15486.
    """
    blocks = site.maps.some.shape[2]
    step = blocks
    if pairs is not None:
        step = max(1, pairs // (site.query.shape[0] * site.query.shape[1] * site.keys.vectors.shape[2]))
    found = [_by_rows(part, PHASES[0]) for part in _parts(site, step)]
    peaks = Peaks(*(torch.cat(x, 2) for x in zip(*found, strict=True))) if len(found) > 1 else found[0]
    for phase in PHASES[1 : extra_phases(last_rows) + 1]:
        more = _by_rows(_from_block(site, max(blocks - LAST_BLOCKS, 0)), phase).chosen
        start = blocks - more.shape[2]
        joined = torch.cat((peaks.chosen[:, :, :start], peaks.chosen[:, :, start:] | more), 2)
        peaks = peaks._replace(chosen=joined)
    return peaks


#: Query blocks at the end that get further rows: a question may straddle the edge between two.
LAST_BLOCKS = 2


def extra_phases(last_rows: int) -> int:
    """Further sets of ``ROWS`` rows that each of the last two blocks gets."""
    return min(max(-(-last_rows // LAST_BLOCKS // ROWS) - 1, 0), len(PHASES) - 1)


def base_threshold(some: Tensor, min_peak: Tensor | float, floor: Tensor | float) -> Tensor:
    """The least of ``min_peak`` and what the number of seen key blocks allows: float32 (B or 1, Hq or 1, NQ).

    Our choice: 0, which keeps everything, where ``min_peak`` is 0 or the floor 1, as a rule: sums of float32 do not
    reliably reach 1.
    """
    seen = some.sum(-1).clamp(min=1)
    peak, share = (torch.as_tensor(x, dtype=torch.float32, device=some.device) for x in (min_peak, floor))
    return torch.where(share >= 1, 0.0, torch.minimum(KAPPA / seen, peak))


def _parts(site: PeakSite, step: int) -> list[PeakSite]:
    blocks = site.maps.some.shape[2]
    if step >= blocks:
        return [site]
    return [_from_block(site, start, start + step) for start in range(0, blocks, step)]


def _from_block(site: PeakSite, start: int, stop: int | None = None) -> PeakSite:
    return site._replace(
        maps=Maps(*(x[:, :, start:stop] for x in site.maps)),
        live=LiveRows(*(x[:, :, start:stop] for x in site.live)),
        base=site.base[:, :, start:stop],
        first_block=site.first_block + start,
    )


def _by_rows(site: PeakSite, phase: int) -> Peaks:
    """The rule by one set of rows."""
    places = [row_of(site.live, r, phase, site.query.shape[1], site.first_block) for r in range(ROWS)]
    sees = (site.live.count > 0).unsqueeze(-1)
    forced = site.maps.forced & sees
    eligible = site.maps.some & ~site.maps.forced & sees
    pooled = [_pooled(site, place) for place in places]
    candidates, bar = ~site.maps.full, (site.base * CANDIDATE).unsqueeze(-1)
    for share, _ in pooled:
        candidates = candidates | (share >= bar)
    own = forced | (eligible & candidates)
    chosen, logs = torch.zeros_like(own), torch.empty(0)
    for place, (share, total) in zip(places, pooled, strict=True):
        logs = exact_logs(site.query, site.keys, place, site.scale, site.score, site.mask.pairs)
        shares = _row_shares(logs, own, share, total)
        chosen = chosen | (shares >= _threshold(shares, forced, site.base, site.floor).unsqueeze(-1))
    chosen = eligible & own & chosen
    kept = (torch.softmax(logs, -1) * (chosen | forced)).sum(-1)  # of the last row: the witness
    kept = torch.where(torch.isfinite(kept) & sees.squeeze(-1), kept, 1.0)
    kv_heads = site.keys.vectors.shape[1]
    scored = own.unflatten(1, (kv_heads, -1)).any(2).sum(-1).float().repeat_interleave(own.shape[1] // kv_heads, 1)
    return Peaks(chosen, kept, scored)


def _pooled(site: PeakSite, place: Tensor) -> tuple[Tensor, Tensor]:
    """A row's softmax between block means, 0 outside the blocks that it sees wholly; and its log-sum-exp."""
    logits = row_logits(site.query, site.keys.means, place, site.scale)
    if site.score is not None:
        blocks = torch.arange(site.keys.means.shape[2], device=logits.device)
        b = torch.arange(logits.shape[0], device=logits.device).view(-1, 1, 1, 1)
        h = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
        centre = (blocks * site.keys.block + site.keys.block // 2).clamp(max=site.keys.vectors.shape[2] - 1)
        logits = site.score(logits, b, h, place.unsqueeze(-1), centre.view(1, 1, 1, -1))
    return pooled_shares(logits + math.log(site.keys.block), site.maps.full)


def _row_shares(logs: Tensor, own: Tensor, pooled: Tensor, total: Tensor) -> Tensor:
    """A row's softmax over the blocks computed exactly; the others join its normaliser by their means."""
    exact = logs.masked_fill(~own, float("-inf"))
    others = pooled.masked_fill(own, 0.0).sum(-1).log() + total.nan_to_num(neginf=0.0)
    normal = torch.logaddexp(torch.logsumexp(exact, -1), others)
    return torch.exp(exact - normal.unsqueeze(-1)).nan_to_num(0.0)


def _threshold(shares: Tensor, forced: Tensor, base: Tensor, floor: Tensor | float) -> Tensor:
    """The lesser of ``base`` and the highest power of 2 at which a row keeps its floor; 0 if it does at none."""
    always = (shares * forced).sum(-1, keepdim=True)
    far = shares.masked_fill(forced, 0.0).unsqueeze(-1)
    tried = torch.exp2(torch.arange(0, LOWEST - 1, -1, dtype=torch.float32, device=shares.device))
    reached = always + (far * (far >= tried)).sum(-2) >= floor
    return torch.minimum(base, (tried * reached).amax(-1))

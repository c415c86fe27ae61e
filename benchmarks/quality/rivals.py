"""Other projects' rules as masks, written from their papers: what the library's rule must beat at an equal kept share.

No code of theirs is used. Where a paper leaves a choice open, the docstring names ours; SELECTION.md, section 4, holds
what their own code keeps and loses on the same text.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.block_masks import BLOCK, Blocks, Kept, Rule, attend_by_pairs, causal_blocks
from benchmarks.quality.own_rules import BLOCK_RULES, peak
from benchmarks.quality.rows import logits
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention.functional import causal_index_mask
from omnisparse_flex.masks.blocks.promise import one_call
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.statistics import scoring_blocks


def strided_sums(query: Tensor, key: Tensor, scale: float, *, stride: int, mass: float) -> Kept:
    """XAttention, arXiv 2503.16428: antidiagonal sums of ``stride`` x ``stride`` tiles, each head, summed mass.

    The softmax runs over the tiles of a row of tiles, a block's mass is the sum of its tiles'. The first block and the
    diagonal are kept, then the heaviest blocks until the row of blocks holds ``mass`` of its total.
    """
    count = query.shape[2] // stride
    folded_q = query.unflatten(2, (count, stride)).flip(3).flatten(3)
    folded_k = key.unflatten(2, (count, stride)).flatten(3)
    tiles = logits(folded_q, folded_k, scale / stride)
    order = torch.arange(count, device=query.device)
    shares = torch.softmax(tiles.masked_fill_(order > order[:, None], float("-inf")), -1)
    side = BLOCK // stride
    blocks = shares.unflatten(2, (-1, side)).sum(3).unflatten(-1, (-1, side)).sum(-1)
    ends = torch.eye(blocks.shape[2], dtype=torch.bool, device=query.device)
    ends[:, 0] = True
    return Blocks(_until(blocks, ends, mass))


def share_of_maximum(query: Tensor, key: Tensor, scale: float, *, alpha: float) -> Kept:
    """FlashPrefill, arXiv 2603.06199: all queries by block-mean keys, blocks above ``alpha`` of the heaviest one.

    A block's score is the sum of ``exp`` of its rows' products with the mean key, over blocks wholly in the past; no
    row is normalised. Two sink blocks, a window of four and the last two rows of blocks are kept, as in its defaults.
    """
    means = key.unflatten(2, (-1, BLOCK)).mean(3)
    count, places = means.shape[2], torch.arange(query.shape[2], device=query.device)
    products = logits(query, means, scale)
    last = (torch.arange(count, device=query.device) + 1) * BLOCK - 1
    products = products.masked_fill(last > places[:, None], float("-inf")).unflatten(2, (-1, BLOCK))
    scores = torch.logsumexp(products, 3)
    bar = scores.amax(-1, keepdim=True) + math.log(alpha)
    row, column = torch.arange(count, device=query.device)[:, None], torch.arange(count, device=query.device)
    fixed = (column < 2) | (row - column < 4) | (row >= count - 2)
    return Blocks((((scores >= bar) & (scores > float("-inf"))) | fixed) & (column <= row))


class ColumnsAndDiagonals(NamedTuple):
    """Single columns, and diagonals in whole blocks of ``side`` queries and keys.

    Attributes:
        columns: bool (B, Hq, N).
        diagonals: bool (B, Hq, NB), by the number of block diagonals below the main one.
        side: Tokens.
    """

    columns: Tensor
    diagonals: Tensor
    side: int

    def pairs(self, start: int, stop: int) -> Tensor:
        """See ``Kept``."""
        rows = torch.arange(start, stop, device=self.columns.device)[:, None] // self.side
        below = (rows - torch.arange(stop, device=self.columns.device) // self.side).clamp(min=0)
        on_diagonal = self.diagonals[..., below.flatten()].unflatten(-1, below.shape)
        return on_diagonal | self.columns[:, :, None, :stop]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See ``Kept``."""
        return attend_by_pairs(self, query, key, value, scale)

    def share(self) -> float:
        """See ``Kept``."""
        kept, seen, length = 0, 0, self.columns.shape[2]
        for start in range(0, length, 1024):
            stop = min(start + 1024, length)
            places = torch.arange(stop, device=self.columns.device)
            causal = places <= places[start:, None]
            kept += (self.pairs(start, stop) & causal).sum().item()
            seen += causal.sum().item() * self.columns.shape[:2].numel()
        return kept / seen


def columns_and_diagonals(query: Tensor, key: Tensor, scale: float, *, rows: int, columns: int, diagonals: int) -> Kept:
    """MInference, arXiv 2407.02490: the heaviest columns and diagonals of the last ``rows`` queries, every head.

    The first 30 columns and the latest 100 diagonals are always among them. Diagonals are computed in blocks of 64.
    """
    length = query.shape[2]
    last = _last_rows(query, key, scale, rows)
    upright, slanted = last.sum(2), _diagonals(last)
    upright[..., :30], slanted[..., :100] = float("inf"), float("inf")
    chosen = _largest(upright, min(columns, length)), _largest(slanted, min(diagonals, length))
    side = 64
    # A diagonal ``d`` below the main one crosses the block diagonals d // side and the next.
    near = F.pad(chosen[1], (0, -length % side)).unflatten(-1, (-1, side))
    crossed = near.any(-1) | F.pad(near[..., 1:].any(-1), (1, -1))
    return ColumnsAndDiagonals(chosen[0], crossed, side)


def by_divergence(
    query: Tensor, key: Tensor, scale: float, *, mass: float, least: int = 512, divergence: float = 0.1
) -> Kept:
    """FlexPrefill, arXiv 2502.20766: a head's last block of queries says how the head chooses.

    If block means tell that block's distribution (root of the Jensen-Shannon divergence under ``divergence``), the
    head keeps the heaviest pairs of block means until ``mass`` of the whole map; else so many blocks of columns and
    of block diagonals as tokens are needed for ``mass`` of the last block, at least ``least`` tokens of each.
    """
    mean_q, mean_k = (x.unflatten(2, (-1, BLOCK)).mean(3) for x in (query, key))
    count = mean_q.shape[2]
    seen = causal_blocks(count, count, 1, query.device)
    pooled = torch.softmax(logits(mean_q, mean_k, scale).masked_fill(~seen, float("-inf")), -1)
    last = _last_rows(query, key, scale, BLOCK)
    truth = last.mean(2).unflatten(-1, (-1, BLOCK)).sum(-1)
    aware = _divergence(pooled[:, :, -1], truth).sqrt() < divergence
    first = torch.zeros_like(seen)
    first[:, 0] = True
    first |= torch.eye(count, dtype=torch.bool, device=query.device)
    whole = _until((pooled / count).flatten(2).unsqueeze(2), torch.zeros(1, dtype=torch.bool), mass)
    by_means = whole.unflatten(-1, (count, count)).squeeze(2)
    upright, slanted = (_in_blocks(x, mass, least) for x in (last.mean(2), _diagonals(last) / BLOCK))
    below = torch.arange(count, device=query.device)[:, None] - torch.arange(count, device=query.device)
    slashes = slanted[..., below.clamp(min=0).flatten()].unflatten(-1, below.shape)
    keep = torch.where(aware[..., None, None], by_means, upright[:, :, None] | slashes)
    return Blocks((keep | first) & seen)


def sinks_and_window(query: Tensor, key: Tensor, scale: float, *, share: float) -> Kept:
    """The first block, and so many of the latest blocks of 64 keys that ``share`` of the causal blocks is kept."""
    rows, columns = query.shape[2] // BLOCK, query.shape[2] // 64
    seen = causal_blocks(rows, columns, 2, query.device)
    row, column = torch.arange(rows, device=query.device)[:, None], torch.arange(columns, device=query.device)
    for width in range(columns + 1):
        keep = ((column < 1) | (2 * row - column < width)) & seen
        if keep.sum() >= share * seen.sum():
            break
    return Blocks(keep.expand(*query.shape[:2], -1, -1), 64)


def chosen_by(query: Tensor, key: Tensor, scale: float, *, config: OmniSparseConfig, shuffled: bool = False) -> Kept:
    """The library's own choice; ``shuffled``: as many blocks of each row, but which is left to chance."""
    mask = causal_index_mask(0, query.device)
    found = select_blocks(
        query, key, mask, config, target=config.recall_of(0), min_peak=config.min_peak_of(0), scale=scale
    )
    if not shuffled:
        allowed = found.layout.some.expand_as(found.keep).sum() / found.keep.shape[:2].numel()
        scores = (scoring_blocks(found, config, allowed) / allowed).item()
        told = {"scores": scores}
        if config.budget == "peak":
            told["told_recall"], told["told_worst_head"], *_ = one_call(found.recall, found.layout.some, 1.0).tolist()
        return Blocks(found.keep, config.key_block, told)
    eligible = found.layout.eligible.expand_as(found.keep)
    noise = torch.rand(found.keep.shape, generator=torch.Generator().manual_seed(0)).to(query.device)
    order = noise.masked_fill(~eligible, -1.0).argsort(-1, descending=True).argsort(-1)
    number = (found.keep & eligible).sum(-1, keepdim=True)
    return Blocks(((order < number) & eligible) | found.layout.forced, config.key_block)


def _until(mass: Tensor, always: Tensor, target: float) -> Tensor:
    """The entries of ``always``, and the largest others until they hold ``target`` of each row's total."""
    rest = mass.masked_fill(always, 0.0)
    values, order = rest.sort(-1, descending=True)
    before = mass.sum(-1, keepdim=True) - rest.sum(-1, keepdim=True) + values.cumsum(-1) - values
    chosen = (before < target * mass.sum(-1, keepdim=True)) & (values > 0)
    return torch.zeros_like(chosen).scatter(-1, order, chosen) | (always & (mass > 0))


def _last_rows(query: Tensor, key: Tensor, scale: float, rows: int) -> Tensor:
    """Exact causal softmax rows of the last queries: (B, Hq, rows, N)."""
    length = query.shape[2]
    places = torch.arange(length, device=query.device)
    scores = logits(query[:, :, -rows:], key, scale)
    return torch.softmax(scores.masked_fill(places > places[-rows:, None], float("-inf")), -1)


def _diagonals(last: Tensor) -> Tensor:
    """Sums of (B, Hq, R, N) rows along diagonals, by their distance from the main one: (B, Hq, N)."""
    rows, length = last.shape[2:]
    places = torch.arange(length, device=last.device)
    distance = places[-rows:, None] - places
    index = distance.clamp(min=0).expand_as(last).flatten(2)
    return torch.zeros_like(last[:, :, 0]).scatter_add(-1, index, last.masked_fill(distance < 0, 0.0).flatten(2))


def _largest(values: Tensor, count: int) -> Tensor:
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(count, -1).indices, True)


def _in_blocks(values: Tensor, mass: float, least: int) -> Tensor:
    """Bool (B, Hq, NB): the heaviest blocks, as many as the tokens that hold ``mass`` fill."""
    ordered = values.sort(-1, descending=True).values
    tokens = (ordered.cumsum(-1) < mass).sum(-1) + 1
    count = (tokens // BLOCK + 1).clamp(min=least // BLOCK).unsqueeze(-1)
    blocks = values.unflatten(-1, (-1, BLOCK)).sum(-1)
    return blocks.argsort(-1, descending=True).argsort(-1) < count


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (..., M)."""
    middle = ((a + b) / 2).clamp(min=1e-20).log()
    return sum(((x * (x.clamp(min=1e-20).log() - middle)).sum(-1) for x in (a, b)), torch.zeros(())) / 2


#: Kept share of the controls: what the default keeps at 8K tokens.
EQUAL_SHARE = 0.23
#: Row -> rule.
MASKS: dict[str, Rule] = {
    **{f"XAttention {mass}": functools.partial(strided_sums, stride=8, mass=mass) for mass in (0.98, 0.95, 0.9, 0.8)},
    **{f"FlashPrefill {alpha}": functools.partial(share_of_maximum, alpha=alpha) for alpha in (0.02, 0.05, 0.1)},
    **{f"FlexPrefill {mass}": functools.partial(by_divergence, mass=mass) for mass in (0.98, 0.95, 0.9)},
    "MInference 1000+1000": functools.partial(columns_and_diagonals, rows=64, columns=1000, diagonals=1000),
    "sinks and window": functools.partial(sinks_and_window, share=EQUAL_SHARE),
    "random": functools.partial(chosen_by, config=peak(64, 128), shuffled=True),
    **{f"{name}, as masks": functools.partial(chosen_by, config=config) for name, config in BLOCK_RULES.items()},
}

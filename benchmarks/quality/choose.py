"""From estimated rows to the pairs that are kept, one stretch of queries at a time."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.rows import Rows, causal, logits
from benchmarks.quality.rules import Rule
from omnisparse_flex.masks.blocks.budget import keep_top, need, rank, shared_budget


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a stretch of queries keeps.

    Attributes:
        keep: bool (B, Hq, R, M), pairs.
        active: bool (B, Hq, R), queries that may look far.
        lazy: bool (B, Hq, R), queries judged near-sighted, the kept sub-sample included.
        needs: int64 (B, H, S), units each segment needs; H as the group agrees.
        budget: int64 (B, H, S), units it got.
        rectangle: float, pairs computed where every active query meets every chosen key, over batch and heads.
    """

    keep: Tensor
    active: Tensor
    lazy: Tensor
    needs: Tensor
    budget: Tensor
    rectangle: float


def local_pairs(rule: Rule, start: int, stop: int, device: torch.device) -> Tensor:
    """Bool (R, M): sinks and window, as whole blocks at block granularity; always within causality."""
    q = torch.arange(start, stop, device=device)[:, None]
    k = torch.arange(stop, device=device)
    near = ((q - k < rule.window) | (k < rule.sinks)) & (k <= q)
    if rule.blocks:
        tiles = _by_unit(near.float(), rule.unit).unflatten(0, (-1, rule.segment)).sum(1) > 0
        near = _to_pairs(tiles, rule.segment, rule.unit, stop)
    return near & causal(start, stop, device)


def choose(
    mass: Tensor, local: Tensor, rule: Rule, start: int, generator: torch.Generator, guessed: Tensor | None = None
) -> Chosen:
    """Apply a rule to estimated rows.

    Args:
        mass: float32 (B, Hq, R, M), estimated rows; ``R`` is a multiple of the segment.
        local: bool (R, M), pairs that are kept anyway.
        rule: The rule.
        start: Position of the first query.
        generator: For the random control.
        guessed: (B, Hq, R), share of each row's mass beyond ``local`` that lazy queries are judged by; None: the rows'.
    """
    stop, segment = start + mass.shape[2], rule.segment or mass.shape[2]
    far = mass * ~local
    breadth, total = far.sum(-1), mass.sum(-1)
    share = breadth / total.clamp(min=1e-20) if guessed is None else guessed
    active, lazy = _active(share, rule, start, segment)
    weighed = (far * active.unsqueeze(-1)).unflatten(2, (-1, segment))
    column = _agreed(_by_unit(weighed.sum(3), rule.unit), rule)
    kept = _agreed(((total - breadth) * active).unflatten(2, (-1, segment)).sum(-1).unsqueeze(-1), rule).squeeze(-1)
    eligible = _eligible(rule, start, stop, segment, column)
    sorted_mass, order = rank(column, eligible)
    needs = need(sorted_mass, kept, eligible.sum(-1).expand_as(kept), rule.target)
    asking = _agreed(active.unflatten(2, (-1, segment)).any(-1).unsqueeze(-1).float(), rule).squeeze(-1) > 0
    units = rule.budget if isinstance(rule.budget, str) else -(-rule.budget // rule.unit)
    budget = torch.minimum(shared_budget(needs, asking, units), eligible.sum(-1).expand_as(needs))
    if rule.rank_by == "max":
        column = _agreed(_by_unit(weighed.amax(3), rule.unit, peak=True), rule)
    order = _order(column, order, eligible, rule, generator)
    groups = mass.shape[1] // column.shape[1]
    chosen = keep_top(order, eligible.expand_as(column), budget).repeat_interleave(groups, 1)
    pairs = _to_pairs(chosen, segment, rule.unit, stop)
    rows = active.unflatten(2, (-1, segment)).sum(-1)
    rectangle = (rows * budget.repeat_interleave(groups, 1)).sum().item() * rule.unit
    keep = local | (pairs & active.unsqueeze(-1) & causal(start, stop, mass.device))
    if rule.lazy_mode == "skip":
        keep &= active.unsqueeze(-1)
    return Chosen(keep, active, lazy, needs, budget, rectangle)


def refined(coarse: Tensor, local: Tensor, rule: Rule, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Exact rows within a shortlist: each segment's and head's ``rule.refine`` heaviest keys by the coarse rows.

    Args:
        coarse: float32 (B, Hq, R, M).
        local: bool (R, M).
        rule: The rule.
        query: (B, Hq, R, D), the same queries.
        key: (B, Hkv, M, D).
        scale: Logit scale.

    Returns:
        Rows of the same shape that are zero outside the shortlist and the local part.
    """
    segment = rule.segment or coarse.shape[2]
    column = (coarse * ~local).unflatten(2, (-1, segment)).sum(3)
    count = max(1, round(rule.refine * column.shape[-1]))
    listed = torch.zeros_like(column, dtype=torch.bool).scatter(-1, column.topk(count, dim=-1).indices, True)
    start = key.shape[2] - query.shape[2]
    pairs = (listed.repeat_interleave(segment, 2) | local) & causal(start, key.shape[2], key.device)
    return torch.softmax(logits(query, key, scale).masked_fill_(~pairs, float("-inf")), dim=-1)


def estimate(rows: Rows, rule: Rule, local: Tensor, query: Tensor, key: Tensor, scale: float, start: int) -> Tensor:
    """The rule's estimated rows of queries ``start`` onwards (``query`` holds just those)."""
    coarse = rows(start, start + query.shape[2])
    return coarse if rule.refine is None else refined(coarse, local, rule, query, key, scale)


def _active(breadth: Tensor, rule: Rule, start: int, segment: int) -> tuple[Tensor, Tensor]:
    if rule.lazy is None:
        lazy = torch.zeros_like(breadth, dtype=torch.bool)
        return ~lazy, lazy
    rows = torch.arange(start, start + breadth.shape[-1], device=breadth.device)
    if rule.blocks:  # a block of queries is lazy as one
        breadth = breadth.unflatten(2, (-1, segment)).mean(-1).repeat_interleave(segment, 2)
        rows = rows // segment
    lazy = breadth < rule.lazy
    sampled = rows % rule.lazy_stride == 0 if rule.lazy_stride else torch.zeros_like(rows, dtype=torch.bool)
    return ~lazy | sampled, lazy


def _eligible(rule: Rule, start: int, stop: int, segment: int, column: Tensor) -> Tensor:
    """Bool (1, 1, S, U): units that some query of the segment sees and none has among its local keys."""
    ends = torch.arange(start + segment, stop + 1, segment, device=column.device)[:, None]
    first = torch.arange(column.shape[-1], device=column.device) * rule.unit
    if rule.blocks:
        far = first + rule.unit <= (ends - segment - rule.window + 1).clamp(min=0)
        return (far & (first >= rule.sinks))[None, None]
    return ((first + rule.unit > rule.sinks) & (first <= ends - 1 - rule.window))[None, None]


def _order(column: Tensor, order: Tensor, eligible: Tensor, rule: Rule, generator: torch.Generator) -> Tensor:
    if rule.choice == "random":
        noise = torch.rand(column.shape, generator=generator, device=column.device)
        return rank(noise, eligible)[1]
    if rule.choice == "recent":
        return rank(torch.arange(column.shape[-1], device=column.device).float().expand_as(column), eligible)[1]
    return order if rule.rank_by == "sum" else rank(column, eligible)[1]


def _agreed(mass: Tensor, rule: Rule) -> Tensor:
    """One mass per group of query heads, where the group shares a choice (three heads to a KV head here)."""
    if rule.gqa == "none":
        return mass
    grouped = mass.unflatten(1, (-1, GROUP))
    return grouped.mean(2) if rule.gqa == "mean" else grouped.amax(2)


#: Query heads per KV head of SmolLM2.
GROUP = 3


def _by_unit(columns: Tensor, unit: int, *, peak: bool = False) -> Tensor:
    """(..., M) -> (..., ceil(M / unit)), summed or the maximum."""
    if unit == 1:
        return columns
    padded = F.pad(columns, (0, -columns.shape[-1] % unit)).unflatten(-1, (-1, unit))
    return padded.amax(-1) if peak else padded.sum(-1)


def _to_pairs(units: Tensor, segment: int, unit: int, columns: int) -> Tensor:
    """(..., S, U) -> (..., S * segment, columns)."""
    keys = units if unit == 1 else units.repeat_interleave(unit, -1)[..., :columns]
    return keys.repeat_interleave(segment, -2)

"""The choice of cached keys: what every head keeps, the decode pattern, and the keys that each head adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Text queries that the decode pattern is read from. Our choice: about one question.
PATTERN_QUERIES = 32
#: A key ranks by the largest mass within this many keys of it. Our choice: the next decoded token often needs a key
#: beside those that the question attends to (an answer's second word stands beside its first). Source: SnapKV, arXiv
#: 2404.14469.
NEIGHBOURS = 3
#: Keys converted to float32 at a time while the pattern is read.
KEY_CHUNK = 16384
#: Most logits in memory at a time, because a layer is slimmed while the device also holds it in full.
LOGITS = 1 << 23


@dataclasses.dataclass(frozen=True, slots=True)
class HeadChoice:
    """What the KV heads of one layer fetch.

    Attributes:
        lazy: Heads that fetch no visual key.
        fetching: All other heads.
        picked: int64 (B, len(fetching), k), the droppable keys of each fetching head, as columns of ``Plan.drop``.
    """

    lazy: tuple[int, ...]
    fetching: tuple[int, ...]
    picked: Tensor

    def drops(self, droppable: int) -> bool:
        """Whether any head drops one of ``droppable`` keys."""
        return droppable > 0 and (len(self.lazy) > 0 or self.picked.shape[2] < droppable)


#: ``(mass (B, Hkv, n), layer) -> Choice``; the mass is -1 where a row has fewer droppable keys.
Chooser = Callable[[Tensor, int], HeadChoice]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a choice that all layers share; made once, before the layers run.

    Attributes:
        length: Tokens in the cache after the call.
        base: int64 (B, n), ascending positions of keys that every head keeps; rows with fewer end in ``length``.
        drop: int64 (B, n), the same for the keys that a head may drop.
        fresh: int64 (B, n), the part of ``drop`` that the host does not hold yet.
        real: bool (B, length), keys that exist.
        ragged: Whether rows differ in their number of keys.
        queries: int64 (B, P), the call's queries from which the pattern is read, by index in the call.
        weights: float32 (B, P), each query's share in the pattern; 0 where a row has fewer.
    """

    length: int
    base: Tensor
    drop: Tensor
    fresh: Tensor
    real: Tensor
    ragged: bool
    queries: Tensor
    weights: Tensor


def make_plan(droppable: Tensor, hosted: Tensor, real: Tensor, text: Tensor, first: int) -> Plan:
    """Sort the cached tokens into kept and droppable ones.

    Args:
        droppable: bool (B, length).
        hosted: bool (B, length), droppable tokens that the host already holds.
        real: bool (B, length).
        text: bool (B, L), which of the call's L queries are real text.
        first: Position of the call's query 0.

    Returns:
        The plan.
    """
    base, ragged_base = positions_of(real & ~droppable)
    drop, ragged_drop = positions_of(droppable)
    fresh, _ = positions_of(droppable & ~hosted)
    candidates = torch.where(text.any(1, keepdim=True), text, real[:, first:])
    count = min(PATTERN_QUERIES, candidates.shape[1])
    rank = candidates.flip(1).cumsum(1)  # 1 for the last candidate
    last = torch.where(candidates.flip(1) & (rank <= count), 1, 0).flip(1)
    queries = last.sort(dim=1, stable=True).indices[:, -count:]
    votes = last.gather(1, queries).float()
    weights = votes / votes.sum(1, keepdim=True).clamp(min=1)
    return Plan(real.shape[1], base, drop, fresh, real, ragged_base or ragged_drop, queries, weights)


def droppable_tokens(visual: Tensor, real: Tensor, sink_size: int, window_size: int) -> Tensor:
    """Visual tokens outside sinks and recent tokens, bool (B, length).

    Args:
        visual: bool (B, length).
        real: bool (B, length), tokens that are no padding.
        sink_size: First real tokens of a row that every head keeps.
        window_size: Latest real tokens of a row that every head keeps.

    Source: PAPER "KV-cache slimming": a lazy head keeps text, sinks and recent.
    """
    rank = real.cumsum(1)
    inner = (rank > sink_size) & (rank <= rank[:, -1:] - window_size)
    return visual & real & inner


def positions_of(mask: Tensor) -> tuple[Tensor, bool]:
    """Ascending positions of the True of each row, int64 (B, n), padded with the row length; and whether any are."""
    length = mask.shape[1]
    counts: list[int] = mask.sum(1).tolist()
    places = torch.arange(length, device=mask.device).expand_as(mask)
    positions = torch.where(mask, places, length).sort(dim=1).values[:, : max(counts)]
    return positions.contiguous(), min(counts) < max(counts)


def pattern_mass(query: Tensor, key: Tensor, positions: Tensor, weights: Tensor, real: Tensor, scale: float) -> Tensor:
    """Attention mass that each key gets from a few queries: exact softmax rows, averaged.

    Args:
        query: (B, Hq, P, D).
        key: (B, Hkv, S, D).
        positions: int64 (B, P), where the queries sit among the keys.
        weights: float32 (B, P), each query's share; a row sums to 1 (or to 0: no vote).
        real: bool (B, S), keys that exist.
        scale: Logit scale.

    Returns:
        float32 (B, Hkv, S); sums to the row's weights.

    Source: PAPER "KV-cache slimming": the decode pattern is read from the last queries.
    Our choice: a group's mass is the mean over its query heads.
    """
    batch, heads, count, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    seen = torch.arange(length, device=key.device) <= positions[:, :, None]
    hidden = ~(seen & real[:, None, :])[:, None]
    mass = torch.zeros(batch, kv_heads, length, device=key.device)
    step = min(count, max(1, LOGITS // (batch * groups * length)))
    for head in range(kv_heads):  # few rows at a time: each is as wide as the cache is long
        rows = query[:, head * groups : (head + 1) * groups].float() * scale
        for start in range(0, count, step):
            part = slice(start, start + step)
            logits = _logits(rows[:, :, part].flatten(1, 2), key[:, head])
            logits.view(batch, groups, -1, length).masked_fill_(hidden[:, :, part], float("-inf"))
            logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            votes = weights[:, part].repeat(1, groups)
            # A query of padding attends to no key: its row is NaN, and its weight is 0.
            share = torch.where(votes > 0, votes / groups / logits.sum(-1), 0.0)
            mass[:, head] += (share[:, None] @ logits.nan_to_num_(0.0))[:, 0]
    return mass


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """Float32 products (B, R, S) of query (B, R, D) and key (B, S, D), which is converted in parts."""
    logits = torch.empty(*query.shape[:2], key.shape[1], device=key.device)
    for start in range(0, key.shape[1], KEY_CHUNK):
        stop = start + KEY_CHUNK
        logits[:, :, start:stop] = query @ key[:, start:stop].float().transpose(1, 2)
    return logits


def droppable_mass(mass: Tensor, plan: Plan) -> Tensor:
    """The columns of ``Plan.drop``: float32 (B, Hkv, n), -1 where a row has fewer."""
    slots = plan.drop[:, None].expand(-1, mass.shape[1], -1)
    gathered = mass.gather(2, slots.clamp(max=plan.length - 1))
    return torch.where(slots < plan.length, gathered, -1.0)


def ranked(mass: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Droppable keys in the order in which they are picked, int64 (B, Hkv, n); missing keys of a row come last.

    Args:
        mass: float32 (B, Hkv, n); -1: no such key in this row.
        neighbours: Distance in keys within which a key ranks by the largest mass.
    """
    if mass.shape[2] == 0:
        return torch.zeros_like(mass, dtype=torch.int64)
    around = F.max_pool1d(mass, 2 * neighbours + 1, stride=1, padding=neighbours)
    return torch.where(mass < 0, mass, around).sort(dim=-1, descending=True).indices


def choose_keys(mass: Tensor, recall: float, max_keys: int | None = None, neighbours: int = NEIGHBOURS) -> HeadChoice:
    """Split the heads into lazy and fetching ones, and pick each fetching head's keys.

    Args:
        mass: float32 (B, Hkv, n), attention mass of the droppable keys; -1: no such key in this row.
        recall: Share of its whole attention mass that a head must keep.
        max_keys: Upper bound of k*, or None.
        neighbours: As in ``ranked``.

    Returns:
        The choice. Waits for the device.

    Source: PAPER "KV-cache slimming". Our choice: a head is lazy if in every row it keeps ``recall``
    without any droppable key; k* is the largest need of any fetching head and row; a recall of 1
    is a rule (every head fetches all), not a comparison.
    """
    count, heads = mass.shape[2], range(mass.shape[1])
    order = ranked(mass, neighbours)
    ordered = mass.gather(2, order).clamp(min=0)
    always = 1 - ordered.sum(-1, keepdim=True)
    kept = torch.cat([always, always + ordered.cumsum(-1)], -1)
    need: list[int] = (kept < recall).sum(-1).amax(0).clamp(max=count).tolist()
    if recall >= 1:
        need = [count] * len(heads)
    k = min(max(need), count if max_keys is None else max_keys)
    lazy = tuple(h for h in heads if need[h] == 0 or k == 0) if count else ()
    fetching = tuple(h for h in heads if h not in lazy)
    return HeadChoice(lazy, fetching, order[:, list(fetching), :k])


def keep_all(plan: Plan, heads: int) -> HeadChoice:
    """Every head fetches every droppable key."""
    columns = torch.arange(plan.drop.shape[1], device=plan.drop.device)
    return HeadChoice((), tuple(range(heads)), columns.expand(plan.drop.shape[0], heads, -1))


def kept_positions(plan: Plan, picked: Tensor | None, heads: int) -> Tensor:
    """Ascending positions of the keys that lazy or fetching heads keep.

    Args:
        plan: The plan.
        picked: int64 (B, heads, k) columns of ``plan.drop``, or None for lazy heads.
        heads: Number of heads.

    Returns:
        int64 (B, heads, n); a row with fewer ends in ``plan.length``. Lazy heads share one row of memory.
    """
    if picked is None:
        return plan.base[:, None].expand(-1, heads, -1)
    fetched = plan.drop[:, None].expand(-1, heads, -1).gather(2, picked)
    kept = torch.cat([plan.base[:, None].expand(-1, heads, -1), fetched], 2).sort(dim=2).values
    # A row with more text may have fewer visual tokens, so no row needs the sum of both maxima.
    return kept[:, :, : int((kept < plan.length).sum(-1).max())] if plan.ragged else kept

"""Mass of key blocks from a few rows of logits per query block: what all estimators but block means share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.blocks.mean_pool import for_products, live_counts


class KeyUnits(NamedTuple):
    """What a row looks at: tokens, or tiles of tokens, the same number ``c`` in every key block.

    Attributes:
        vectors: (B, Hkv, NK * c, E), in order of position.
        positions: int64 (c, 1 or B, 1, 1, NK), the key position that stands for each unit.
        weights: float32 (c, 1 or B, 1, 1, NK), log of the share of the unit that is live; -inf past the last key.
        centres: int64 (c, 1 or B, 1, 1, NK), the key position at which a change of its logits is asked for.
    """

    vectors: Tensor
    positions: Tensor
    weights: Tensor
    centres: Tensor


class SampledQueries(NamedTuple):
    """One row of every query block.

    Attributes:
        vectors: (B, Hq, NQ, E).
        positions: int64 (NQ, 1), the query position that stands for each row.
        exist: bool (NQ, 1); False for rows past the last query.
        centres: int64 (NQ, 1), the query position at which a change of its logits is asked for.
    """

    vectors: Tensor
    positions: Tensor
    exist: Tensor
    centres: Tensor


def accumulate_mass(
    total: Tensor | None,
    rows: SampledQueries,
    units: KeyUnits,
    some: Tensor,
    *,
    scale: float,
    adjust: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Add one row's exact softmax mass to what the rows before it gave.

    Called once per row of a block, so that no tensor holds more than one row of each query
    block against all units: B * Hq * NQ * NK * c elements.

    Args:
        total: What this returned for the rows before, or None.
        rows: The rows.
        units: What they look at.
        some: bool (B or 1, Hq or 1, NQ, NK).
        scale: Logit scale.
        adjust: The model's own change of the logits, see ``Scorer``, or None.
        allowed: The model's mask, ``(b, h, q, kv) -> bool``.

    Returns:
        float32 (B, Hq, NQ, NK), summed over rows. Rows without an allowed unit, and rows that
        are not finite, add nothing.
    """
    batch, heads, q_blocks, _ = rows.vectors.shape
    kv_heads, kv_blocks, per_block = units.vectors.shape[1], some.shape[-1], units.positions.shape[0]
    grouped = rows.vectors.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    logits = (for_products(grouped) @ for_products(units.vectors).transpose(-1, -2)).unflatten(
        -1, (kv_blocks, per_block)
    )
    # Units first: a change of the logits then broadcasts over them.
    logits = logits.unflatten(2, (heads // kv_heads, q_blocks)).flatten(1, 2).permute(4, 0, 1, 2, 3).float() * scale
    if adjust is not None:
        logits = adjust(logits, q=rows.centres, kv=units.centres)

    b = torch.arange(batch, device=some.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=some.device).view(-1, 1, 1)
    pairs = allowed(b, h, rows.positions, units.positions).to(torch.bool)
    logits = (logits + units.weights).masked_fill(~(pairs & some & rows.exist), float("-inf"))
    # First over the units of a block: nothing but the products is then ever as large as they are. Realized: Inductor
    # would write the masked products of every unit, head and row out in one kernel, which takes minutes to compile.
    lse = torch.ops.omnisparse.realize(torch.logsumexp(logits, dim=0))
    mass = torch.softmax(lse, dim=-1).nan_to_num(0.0)
    return mass if total is None else total + mass


def tile_mass(
    tiles: Tensor,
    units: KeyUnits,
    some: Tensor,
    *,
    length: int,
    block: int,
    scale: float,
    adjust: Callable[..., Tensor] | None,
    allowed: Callable[..., Tensor],
) -> Tensor:
    """Mass by rows of tiles of consecutive queries, each tile a row of its own; its last query stands for it.

    Args:
        tiles: (B, Hq, NQ, c, E), the ``c`` tiles of every query block.
        units: What they look at.
        some: bool (B or 1, Hq or 1, NQ, NK).
        length: Number of queries.
        block: Tokens per block.
        scale: Logit scale.
        adjust: The model's own change of the logits, see ``Scorer``, or None.
        allowed: The model's mask.

    Returns:
        float32 (B, Hq, NQ, NK), see ``normalised``.
    """
    count = int(tiles.shape[3])
    starts = torch.arange(tiles.shape[2], device=tiles.device) * block
    size, total = block // count, None
    for row in range(count):
        last = torch.full_like(starts, (row + 1) * size - 1)
        exist = (starts + row * size < length).unsqueeze(1)
        places = (row_positions(x, length, block) for x in (last, last - size // 2))
        rows = SampledQueries(tiles[:, :, :, row], next(places), exist, next(places))
        total = accumulate_mass(total, rows, units, some, scale=scale, adjust=adjust, allowed=allowed)
    assert total is not None  # a block holds at least one tile
    return normalised(total, some)


def normalised(total: Tensor, some: Tensor) -> Tensor:
    """Mass whose rows sum to 1 from what ``accumulate_mass`` gave.

    Our choice: a block of queries none of whose sampled rows sees a key, though others may,
    spreads its mass evenly over ``some``: nothing is known, so nothing is preferred.

    Args:
        total: float32 (B, Hq, NQ, NK), at least 0.
        some: bool (B or 1, Hq or 1, NQ, NK).

    Returns:
        float32 (B, Hq, NQ, NK); a row sums to 1, or to 0 where ``some`` allows nothing.
    """
    seen = total.sum(-1, keepdim=True)
    even = some / some.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(seen > 0, total / seen, even)


def whole_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) -> (B, H, NB * block, D): the last token repeated until the last block is whole."""
    length = x.shape[2]
    if isinstance(length, int) and length % block == 0:
        return x
    rounded_up = (length + block - 1) // block * block
    return x.index_select(2, within(torch.arange(rounded_up, device=x.device), length))


def row_positions(offsets: Tensor, length: int, block: int) -> Tensor:
    """Query positions of one row per block: int64 (NQ, 1), the block's start plus ``offsets``, inside the sequence."""
    starts = torch.arange((length + block - 1) // block, device=offsets.device) * block
    return within(starts + offsets, length).unsqueeze(1)


def key_units(key: Tensor, block: int, size: int, live: Tensor | None = None) -> KeyUnits:
    """Keys of whole blocks, folded ``size`` consecutive tokens to a unit; the first live token stands for it.

    Args:
        key: (B, Hkv, S, D).
        block: Tokens per block, a multiple of ``size``.
        size: Tokens per unit.
        live: bool (B, S), keys that count; of a unit the others are 0, and the rest the larger for it. None: all.

    Returns:
        The units, with E = ``size`` * D.
    """
    count = (key.shape[2] + block - 1) // block
    if live is not None and size > 1:
        share = (live_counts(live, size) / size).clamp(min=1 / size).repeat_interleave(size, 1)[:, : key.shape[2]]
        key = torch.where(live[:, None, :, None], key / share[:, None, :, None].to(key.dtype), 0.0)
    vectors = whole_blocks(key, block).unflatten(2, (count * (block // size), size)).flatten(3)
    return KeyUnits(vectors, *unit_places(key, block, size, live))


def unit_places(key: Tensor, block: int, size: int, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``positions``, ``weights`` and ``centres`` of the ``KeyUnits`` of ``size`` consecutive keys (B, Hkv, S, D)."""
    length = key.shape[2]
    count = (length + block - 1) // block
    starts = torch.arange(count * (block // size), device=key.device) * size
    first = starts.view(count, block // size).transpose(0, 1).view(-1, 1, 1, 1, count)
    if live is not None and size > 1:
        is_live = F.pad(live.to(torch.uint8), (0, count * block - length)).unflatten(1, (count, block // size, size))
        is_live = is_live.permute(2, 0, 1, 3)[:, :, None, None]  # (c, B, 1, 1, NK, size)
        place = within(first + is_live.argmax(-1), length)
        return place, (is_live.sum(-1, dtype=torch.float32) / size).log(), place
    share = (length - first).clamp(min=0, max=size).to(torch.float32) / size
    return within(first, length), share.log(), within(first + size // 2, length)


def within(positions: Tensor, length: int) -> Tensor:
    """Positions inside a sequence: int64 of the same shape, in [0, ``length``)."""
    # Realized: Inductor fails to bound an indirect index that it can follow back to a clamp.
    inside: Tensor = torch.ops.omnisparse.realize(positions.clamp(min=0, max=length - 1))
    return inside

"""Segments of queries: the unit that shares one choice of keys at token granularity."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.masks.blocks.layout import Layout
from omnisparse_flex.masks.expr.block_bounds import any_in_blocks


class SegmentLayout(NamedTuple):
    """A layout seen from segments of queries: every query of a segment has the same always-kept blocks.

    The head axis is that of the heads that choose, Hc, 1 where the mask does not distinguish heads.

    Attributes:
        some: bool (B or 1, Hc or 1, NQ, NK), blocks with possibly allowed pairs.
        near: bool (B or 1, Hc or 1, NQ, NK), blocks that each query block always keeps.
        forced: bool (B or 1, Hc or 1, M, NK), their union over a segment.
        eligible: bool (B or 1, Hc or 1, M, NK), blocks whose tokens may be fetched.
    """

    some: Tensor
    near: Tensor
    forced: Tensor
    eligible: Tensor


def segment_layout(layout: Layout, blocks: int, choices: int) -> SegmentLayout:
    """Segments of ``blocks`` query blocks each, seen by ``choices`` heads that choose.

    Our choice: what one query block of a segment always keeps, all of it keep, and what one
    query head of a group does, all of its group, so that the keys to choose from are the same.
    """
    pairs, kept = (_any_of_group(x, choices) for x in (layout.some, layout.forced))
    rows = pairs.shape[2]
    count = (rows + blocks - 1) // blocks
    some, forced = (any_in_blocks(x, 2, count, blocks) for x in (pairs, kept))
    segment = torch.arange(rows, device=some.device) // blocks
    return SegmentLayout(pairs, pairs & forced.index_select(2, segment), forced, some & ~forced)


def _any_of_group(x: Tensor, choices: int) -> Tensor:
    """(B, Hq or 1, ...) -> (B, Hc or 1, ...): what any head of a group has."""
    if x.shape[1] in (1, choices):
        return x
    grouped: Tensor = x.unflatten(1, (choices, -1)).any(2)
    return grouped


def per_member(x: Tensor, group: int) -> Tensor:
    """(B, Hkv, ...) -> (B, Hkv * group, ...): each KV head's for every query head of its group; a copy."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def pack_rows(active: Tensor, kv_heads: int, segment: int) -> tuple[Tensor, Tensor]:
    """``(rows, row_count)`` of a selection, from bool (B, Hq, L) activity."""
    grouped = segments_of(active.unsqueeze(-1), kv_heads, segment).squeeze(-1)
    order = torch.sort((~grouped).to(torch.uint8), dim=-1, stable=True).indices
    return order, grouped.sum(-1)


def segments_of(x: Tensor, kv_heads: int, segment: int) -> Tensor:
    """(B, Hq, L, D) -> (B, Hkv, M, group * segment, D), padded with zeros (False)."""
    count = (x.shape[2] + segment - 1) // segment
    padded: Tensor = F.pad(x, (0, 0, 0, count * segment - x.shape[2]))
    split = padded.unflatten(2, (count, segment)).unflatten(1, (kv_heads, -1))
    packed: Tensor = split.transpose(2, 3).flatten(3, 4)
    return packed


def tokens_of_segments(x: Tensor, q_len: int, segment: int) -> Tensor:
    """The inverse of ``segments_of``: (B, Hkv, M, group * segment, D) -> (B, Hq, L, D)."""
    split = x.unflatten(3, (-1, segment)).transpose(2, 3)
    tokens: Tensor = split.flatten(3, 4).flatten(1, 2)[:, :, :q_len]
    return tokens


def row_places(rows: Tensor, first_segment: int, group: int, segment: int, q_len: int) -> tuple[Tensor, Tensor]:
    """Query head and query index of packed ``rows`` (B, Hkv, C, R); int64 of that shape; padding is the last query."""
    kv_heads, count = rows.shape[1:3]
    head = torch.arange(kv_heads, device=rows.device).view(1, -1, 1, 1) * group + rows // segment
    start = (torch.arange(count, device=rows.device) + first_segment).view(1, 1, -1, 1) * segment
    return head, (start + rows % segment).clamp(max=q_len - 1)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, H, C, R) of (B, H, C, N, D)."""
    return x.gather(3, rows.unsqueeze(-1).expand(*rows.shape, x.shape[-1]))


def tokens_of_blocks(blocks: Tensor, block: int, length: int) -> Tensor:
    """Block flags to token flags along the last axis."""
    return blocks.repeat_interleave(block, -1)[..., :length]


def max_count(count: Tensor, bound: int) -> int:
    """Largest count, at least 1, where reading it is free (the CPU); else its bound, to not wait for the device."""
    return bound if count.device.type != "cpu" else max(1, int(count.max()))


def wide_dtype(x: Tensor) -> torch.dtype:
    """What logits are computed in: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""Stretches of queries that attend one after the other, so that what is known of all segments at once stays small.

Query heads that choose for themselves (``gqa_choice="head"``) come one member of every group at a time: with keys and
values as they are, a site whose groups have one member.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.masks.expr.causal_padding import PlainMask
from omnisparse_flex.masks.tokens.chunks import at_once
from omnisparse_flex.masks.tokens.key_bits import words
from omnisparse_flex.masks.tokens.segments import SegmentLayout
from omnisparse_flex.masks.tokens.select import TokenSelection

#: The bits of the chosen keys take the keys' and values' bytes divided by this: 128K queries are one stretch.
BITS = 8


class Span(NamedTuple):
    """Some consecutive queries of some heads, and what is known of them; its positions count from the first of them.

    Attributes:
        heads: Its query heads: all, or one member of every group.
        own: Its queries.
        plain: Their mask.
        segments: Their always-kept blocks.
        text: bool (B or 1, own queries), those that are always active.
        columns: int32 (B, Hkv, dims) contiguous, the coordinates that their scores multiply; None: all.
    """

    heads: slice
    own: slice
    plain: PlainMask
    segments: SegmentLayout
    text: Tensor
    columns: Tensor | None


def spans(
    key: Tensor, group: int, config: OmniSparseConfig, plain: PlainMask, segments: SegmentLayout, text: Tensor,
    columns: Tensor | None,
) -> Iterator[Span]:  # fmt: skip
    """All queries, in stretches of whole segments.

    Args:
        key: (B, Hkv, S, D).
        group: Query heads per KV head.
        config: Rules.
        plain: The mask.
        segments: Always-kept blocks.
        text: bool (B or 1, L).
        columns: int32 (B, Hc, dims), the coordinates that scores multiply, by head that chooses; None: all.
    """
    batch, kv_heads, kv_len, _ = key.shape
    segment, count = config.segment_size, segments.forced.shape[2]
    members = [slice(None)] if config.gqa_choice == "group" else [slice(g, None, group) for g in range(group)]
    step = at_once(count, 4 * batch * kv_heads * words(kv_len), key, BITS)
    for heads, first in itertools.product(members, range(0, count, step)):
        own, rows = (slice(first * n, (first + step) * n) for n in (segment, segment // BLOCK))
        offset = None if plain.offset is None else plain.offset + first * segment
        some, near = (x[:, :, rows] for x in (segments.some, segments.near))
        forced, eligible = (x[:, :, first : first + step] for x in (segments.forced, segments.eligible))
        layout = SegmentLayout(some, near, forced, eligible)
        mine = None if columns is None else columns[:, heads].contiguous()
        yield Span(heads, own, PlainMask(offset, plain.real), layout, text[:, own], mine)


def joined(segments: SegmentLayout, parts: list[tuple[slice, TokenSelection]]) -> TokenSelection:
    """The selection of all queries: stretches one after the other, the members of a group side by side.

    Args:
        segments: The always-kept blocks of all queries, the same for all heads: the mask is plain.
        parts: Heads and selection of each span, in order.
    """
    if len(parts) == 1:
        return parts[0][1]
    by_member = itertools.groupby(parts, lambda part: part[0].start)
    stretches = [[selection[1:] for _, selection in own] for _, own in by_member]
    members = [[torch.cat(x, 2) for x in zip(*own, strict=True)] for own in stretches]
    fields = (torch.stack(x, 2).flatten(1, 2) for x in zip(*members, strict=True))
    return TokenSelection(segments, *fields)

"""Chunks of queries that attend one after the other, so that what is known of all segments at once stays small.

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
from omnisparse_flex.masks.expr.causal_padding import CausalPaddingMask
from omnisparse_flex.masks.tokens.chunks import segments_per_chunk
from omnisparse_flex.masks.tokens.key_bits import words
from omnisparse_flex.masks.tokens.segments import SegmentLayout
from omnisparse_flex.masks.tokens.select import TokenSelection

#: The bits of the chosen keys take the keys' and values' bytes divided by this: 128K queries are one chunk.
BITS = 8


class QueryChunk(NamedTuple):
    """Some consecutive queries of some heads, and what is known of them; its positions count from the first of them.

    Attributes:
        heads: Its query heads: all, or one member of every group.
        queries: Its queries.
        mask: Their mask.
        segments: Their always-kept blocks.
        text: bool (B or 1, its queries), those that are always active.
        columns: int32 (B, Hkv, dims) contiguous, the coordinates that their scores multiply; None: all.
    """

    heads: slice
    queries: slice
    mask: CausalPaddingMask
    segments: SegmentLayout
    text: Tensor
    columns: Tensor | None


def query_chunks(
    key: Tensor, group: int, config: OmniSparseConfig, mask: CausalPaddingMask, segments: SegmentLayout, text: Tensor,
    columns: Tensor | None,
) -> Iterator[QueryChunk]:  # fmt: skip
    """All queries, in chunks of whole segments.

    Args:
        key: (B, Hkv, S, D).
        group: Query heads per KV head.
        config: Rules.
        mask: The mask.
        segments: Always-kept blocks.
        text: bool (B or 1, L).
        columns: int32 (B, Hc, dims), the coordinates that scores multiply, by head that chooses; None: all.
    """
    batch, kv_heads, kv_len, _ = key.shape
    segment, count = config.segment_size, segments.forced.shape[2]
    members = [slice(None)] if config.gqa_choice == "group" else [slice(g, None, group) for g in range(group)]
    step = segments_per_chunk(count, 4 * batch * kv_heads * words(kv_len), key, BITS)
    for heads, first in itertools.product(members, range(0, count, step)):
        queries, rows = (slice(first * n, (first + step) * n) for n in (segment, segment // BLOCK))
        offset = None if mask.offset is None else mask.offset + first * segment
        some, near = (x[:, :, rows] for x in (segments.some, segments.near))
        forced, eligible = (x[:, :, first : first + step] for x in (segments.forced, segments.eligible))
        layout = SegmentLayout(some, near, forced, eligible)
        dims = None if columns is None else columns[:, heads].contiguous()
        yield QueryChunk(heads, queries, CausalPaddingMask(offset, mask.real), layout, text[:, queries], dims)


def concat_selections(segments: SegmentLayout, parts: list[tuple[slice, TokenSelection]]) -> TokenSelection:
    """The selection of all queries: chunks one after the other, the members of a group side by side.

    Args:
        segments: The always-kept blocks of all queries, the same for all heads.
        parts: Heads and selection of each chunk, in order.
    """
    if len(parts) == 1:
        return parts[0][1]
    by_member = itertools.groupby(parts, lambda part: part[0].start)
    chunks = [[selection[1:] for _, selection in member] for _, member in by_member]
    members = [[torch.cat(x, 2) for x in zip(*member, strict=True)] for member in chunks]
    fields = (torch.stack(x, 2).flatten(1, 2) for x in zip(*members, strict=True))
    return TokenSelection(segments, *fields)

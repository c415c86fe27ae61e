"""Stretches of queries that attend one after the other, so that what is known of all segments at once stays small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from omnisparse_flex.masks.key_bits import words
from omnisparse_flex.masks.plain import PlainMask
from omnisparse_flex.masks.room import at_once
from omnisparse_flex.masks.segments import SegmentLayout
from omnisparse_flex.masks.select import BLOCK

#: The bits of the chosen keys take the keys' and values' bytes divided by this: 128K queries are one stretch.
BITS = 8


class Span(NamedTuple):
    """Some consecutive queries, and what is known of them; its positions count from the first of them.

    Attributes:
        own: Its queries.
        plain: Their mask.
        segments: Their always-kept blocks.
        text: bool (B or 1, own queries), those that are always active.
    """

    own: slice
    plain: PlainMask
    segments: SegmentLayout
    text: Tensor


def spans(key: Tensor, segment: int, plain: PlainMask, segments: SegmentLayout, text: Tensor) -> Iterator[Span]:
    """All queries, in stretches of whole segments.

    Args:
        key: (B, Hkv, S, D).
        segment: Queries per segment.
        plain: The mask.
        segments: Always-kept blocks.
        text: bool (B or 1, L).
    """
    batch, kv_heads, kv_len, _ = key.shape
    count, blocks = segments.forced.shape[2], segment // BLOCK
    step = at_once(count, 4 * batch * kv_heads * words(kv_len), key, BITS)
    for first in range(0, count, step):
        own, rows = (slice(first * n, (first + step) * n) for n in (segment, blocks))
        offset = None if plain.offset is None else plain.offset + first * segment
        some, near = (x[:, :, rows] for x in (segments.some, segments.near))
        forced, eligible = (x[:, :, first : first + step] for x in (segments.forced, segments.eligible))
        layout = SegmentLayout(some, near, forced, eligible)
        yield Span(own, PlainMask(offset, plain.real), layout, text[:, own])

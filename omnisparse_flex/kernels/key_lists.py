"""Lists of chosen keys, written out of their bits a few segments at a time. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Keys that a program looks at together.
TILE = 4096


@triton.jit(do_not_specialize=["words", "width", "held", "first_segment", "segments"])
def _list(bits, keys, words, width, held, first_segment, segments, TILE: tl.constexpr):
    """The keys of one segment, in order."""
    m, row = tl.program_id(0), tl.program_id(1)
    bits += (row * segments + first_segment + m).to(tl.int64) * words
    keys += (row * held + m).to(tl.int64) * width
    above = 0
    for start in range(0, words * 32, TILE):
        places = start + tl.arange(0, TILE)
        taken = (tl.load(bits + places // 32, mask=places < words * 32, other=0) >> (places % 32)) & 1
        slots = above + tl.cumsum(taken, 0) - 1
        tl.store(keys + slots, places, mask=taken > 0)
        above += tl.sum(taken, 0)


def list_keys(bits: Tensor, part: slice, keys: Tensor) -> None:
    """Write the lists of some segments, ascending; what lies behind a list's end is left alone.

    Args:
        bits: int32 (B, Hkv, M, words) contiguous, see ``pack_bits``.
        part: The segments.
        keys: int32 (B, Hkv, m, K) contiguous, the first of its m segments are written; no segment has more than K keys.
    """
    batch, kv_heads, segments, words = bits.shape
    _list[(part.stop - part.start, batch * kv_heads)](
        bits, keys, words, keys.shape[3], keys.shape[2], part.start, segments, TILE=TILE, num_warps=8
    )

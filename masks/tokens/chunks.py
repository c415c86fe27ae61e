"""How many segments go together: what is held for them stays a share of the layer's keys and values."""

from __future__ import annotations

from torch import Tensor


def layer_bytes(key: Tensor) -> int:
    """Bytes of the keys (B, Hkv, S, D) and of values like them."""
    return 2 * key.numel() * key.element_size()


def segments_per_chunk(count: int, each: int, key: Tensor, share: int) -> int:
    """Segments to take at a time: steps alike in size, one segment at least.

    Args:
        count: Number of segments.
        each: Bytes that one of them takes.
        key: (B, Hkv, S, D).
        share: The part of the keys' and values' bytes that there is room for, as 1 / ``share``.
    """
    max_segments = max(1, layer_bytes(key) // (share * each))
    steps = -(-count // max_segments)
    return -(-count // steps)

"""Sets of keys as bits: one bit a key, where a list takes a word for each key that it may hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.masks.blocks.block_lists import block_lists

#: Keys of a word, and words that go together: those of a block of 128 keys.
WORD, RUN = 32, 4


def words(length: int) -> int:
    """Words of a set of ``length`` keys."""
    return -(-length // (WORD * RUN)) * RUN


def pack_bits(flags: Tensor) -> Tensor:
    """Bool (..., S) to int32 (..., words): key k is bit k % 32 of word k // 32."""
    length = flags.shape[-1]
    split = F.pad(flags, (0, words(length) * WORD - length)).unflatten(-1, (-1, WORD))
    places = torch.arange(WORD, device=flags.device, dtype=torch.int32)
    # The highest bit is the sign: sums wrap around.
    packed: Tensor = (split.to(torch.int32) << places).sum(-1, dtype=torch.int32)
    return packed


def bits_of_blocks(blocks: Tensor, block: int) -> Tensor:
    """Block flags (..., NK) to the bits of their keys; keys past the last one are set too."""
    return blocks.to(torch.int32).neg().repeat_interleave(block // WORD, -1)


def blocks_of_bits(bits: Tensor, block: int) -> Tensor:
    """Blocks that hold any of the keys, bool (..., NK)."""
    has_key: Tensor = (bits != 0).unflatten(-1, (-1, block // WORD)).any(-1)
    return has_key


def unpack_bits(bits: Tensor, length: int) -> Tensor:
    """Int32 (..., words) to bool (..., length)."""
    places = torch.arange(WORD, device=bits.device, dtype=torch.int32)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :length].to(torch.bool)


def keys_of_bits(bits: Tensor, length: int, width: int) -> Tensor:
    """The keys in order, int64 (B, H, M, width); 0 behind them.

    Args:
        bits: int32 (B, H, M, words), no more than ``width`` keys below ``length`` set.
        length: Number of keys.
        width: Columns.
    """
    return block_lists(unpack_bits(bits, length))[1][..., :width].long()

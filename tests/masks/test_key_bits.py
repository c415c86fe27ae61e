"""Sets of keys as bits, against the flags that they stand for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.masks.tokens.key_bits import (
    bits_of_blocks,
    blocks_of_bits,
    keys_of_bits,
    pack_bits,
    unpack_bits,
    words,
)
from omnisparse_flex.masks.tokens.segments import tokens_of_blocks


@given(st.integers(1, 700), st.integers(0, 2**16), st.floats(0, 1))
def test_bits_are_flags(length, seed, share):
    flags = torch.rand((2, 1, 3, length), generator=torch.Generator().manual_seed(seed)) < share
    bits = pack_bits(flags)
    assert (
        bits.dtype == torch.int32 and bits.shape[-1] == words(length) and torch.equal(unpack_bits(bits, length), flags)
    )
    width = int(flags.sum(-1).max()) + 1
    keys = keys_of_bits(bits, length, width)
    for row, listed in zip(flags.flatten(0, 2), keys.flatten(0, 2), strict=True):
        places = row.nonzero().flatten()
        assert torch.equal(listed[: len(places)], places) and not listed[len(places) :].any()


@given(st.integers(1, 700), st.integers(0, 2**16))
def test_blocks_and_back(length, seed):
    blocks = torch.rand((1, 1, 2, -(-length // 128)), generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = bits_of_blocks(blocks, 128)
    assert torch.equal(unpack_bits(bits, length), tokens_of_blocks(blocks, 128, length))
    assert bits.shape[-1] == words(length) and torch.equal(blocks_of_bits(bits, 128), blocks)

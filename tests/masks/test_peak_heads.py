"""The default rule on made heads with 1,024 key blocks: what matters is kept, and crumbs are not."""

from __future__ import annotations

import math

import pytest
import torch

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.layout import own_positions
from omnisparse_flex.masks.blocks.peak_rows import live_rows, row_of
from omnisparse_flex.masks.blocks.select import grid_of, select_blocks
from omnisparse_flex.masks.expr.expr import Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

BLOCKS, ROWS = 1024, 128
FLAT, SINK, NEEDLE, LONE = range(4)
#: Share of a row that the first key has in the heads that have a sink.
SHARE = 0.95


def logit(share, rest, others):
    """Logit of a key with ``share`` of a row whose ``others`` keys at logit 0 have ``rest``."""
    return math.log(share / rest * others)


def made(width):
    """(query, key, needle, lone key): the last 128 queries of 1,024 key blocks, one head of each kind."""
    length = BLOCKS * width
    needle, lone = length // 3, 2 * length // 3
    query, key = torch.zeros(1, 4, ROWS, 16), torch.zeros(1, 1, length, 16)
    key[0, 0, 0, 0] = logit(SHARE, 1 - SHARE, length)
    key[0, 0, needle, 1] = logit(0.015, 1 - SHARE, length)
    key[0, 0, lone, 2] = logit(0.1, 1 - SHARE, length)
    query[0, SINK:, :, 0] = 1.0
    query[0, NEEDLE, :, 1] = 1.0
    grid = grid_of(query, key, 128 // width)
    live = live_rows(IndexMask(causal(Const(length - ROWS))), grid, own_positions(grid, length - ROWS))
    row = int(row_of(live, 5, 0, 4, (length - ROWS) // 128)[0, LONE, 0])
    query[0, LONE, row, 2] = 1.0
    return query, key, needle, lone


@pytest.mark.parametrize("width", [64, 128])
def test_what_matters_is_kept_of_a_thousand_blocks(width):
    query, key, needle, lone = made(width)
    config = OmniSparseConfig(key_block=width)
    offset = key.shape[2] - ROWS
    found = select_blocks(
        query, key, IndexMask(causal(Const(offset))), config, target=config.recall_of(0),
        min_peak=config.min_peak_of(0), scale=1.0, q_offset=offset,
    )  # fmt: skip
    keep, share = found.keep[0, :, 0], found.keep[0, :, 0].float().mean(-1)
    assert keep[NEEDLE, needle // width] and keep[LONE, lone // width]
    assert not keep[SINK, needle // width] and not keep[SINK, lone // width]
    assert (share[SINK:] < 0.01).all(), "beside sinks, window and peaks nothing is fetched"
    assert found.recall[0, FLAT, 0] >= config.recall_of(0), "a flat row keeps its floor"
    assert (found.recall[0, SINK:, 0] > 0.9).all()
    assert found.active[0, :, 0].tolist() == [True, False, True, True]

"""The exact rows at the end of a prompt: what they are, and what they change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import ConfigError, OmniSparseConfig
from omnisparse_flex.masks.blocks.last_rows import BLOCKS, with_last_rows
from omnisparse_flex.masks.blocks.select import SCORERS, change_of_logits, select_blocks
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.masks.statistics import STATS, measure_selection
from omnisparse_flex.testing.oracle import materialize_mask
from tests.masks.test_scorers import ROUNDING, score, sites

BLOCK = 32


def last(query, key, mask, count, *, adjust=None, block=BLOCK, split=1):
    mass, some = score("mean_pool", query, key, mask, block=block, split=split)
    sides = {"block": block, "key_block": block // split}
    how = {"scale": query.shape[-1] ** -0.5, "adjust": adjust, "mask": mask} | sides
    return mass, with_last_rows(mass, query, key, some, count, **how)


def exact(query, key, pairs, key_block, rows, change=lambda logits, positions: logits):
    """Mean mass of some rows, given as a list of positions for each of the last blocks, by plain attention."""
    groups = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(groups, 1).transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = change(logits, torch.arange(query.shape[2])).masked_fill(~pairs, float("-inf"))
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    size = -(-key.shape[2] // key_block) * key_block
    weights = torch.nn.functional.pad(weights, (0, size - key.shape[2])).unflatten(-1, (-1, key_block)).sum(-1)
    return torch.stack([weights[:, :, places].sum(2) for places in rows], 2)


def held(length, block):
    blocks = -(-length // block)
    starts = [at * block for at in range(max(0, blocks - BLOCKS), blocks)]
    return [list(range(start, min(start + block, length))) for start in starts]


@given(sites(), st.sampled_from((16, 32, 48)), st.sampled_from((1, 2)), st.integers(0, 2**16))
def test_as_many_rows_as_a_block_holds_are_plain_attention(site, block, split, seed):
    shape, mask = site
    query, key, _ = shape.inputs(seed=seed)
    before, after = last(3 * query, key, mask, BLOCKS * block, block=block, split=split)
    kept = max(0, before.shape[2] - BLOCKS)
    assert torch.equal(before[:, :, :kept], after[:, :, :kept])
    pairs = materialize_mask(mask.pairs, shape.batch, shape.heads, shape.q_len, shape.kv_len, query.device)
    want = exact(3 * query, key, pairs, block // split, held(shape.q_len, block))
    sums = want.sum(-1, keepdim=True)
    seen = sums[..., 0] > 0
    got = after[:, :, kept:].double()
    assert ((got - want / sums.clamp(min=1e-300))[seen].abs() <= ROUNDING).all()
    assert torch.equal(
        got[~seen].sum(-1) > 0, _some(mask, shape, block, split)[:, :, kept:].any(-1).expand(seen.shape)[~seen]
    )


def _some(mask, shape, block, split):
    cpu = torch.device("cpu")
    return mask.bounds(Grid(shape.batch, shape.heads, shape.q_len, shape.kv_len, block, cpu, split))[1]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70, 96, 97])
@pytest.mark.parametrize("count", [2, 8, 26])
def test_few_rows_are_spread_over_what_a_block_holds(length, count):
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(1, 4, length, 16, generator=generator), torch.randn(1, 2, 80, 16, generator=generator)
    each = count // BLOCKS
    rows = [sorted({places[(r + 1) * len(places) // each - 1] for r in range(each) if (r + 1) * len(places) >= each})
            for places in held(length, BLOCK)]  # fmt: skip
    assert rows[-1][-1] == length - 1
    assert all(len(found) == min(each, len(places)) for found, places in zip(rows, held(length, BLOCK), strict=True))
    want = exact(query, key, torch.ones(length, 80, dtype=torch.bool), BLOCK, rows)
    after = last(query, key, NO_MASK, count)[1][:, :, -len(rows) :]
    assert ((after - want / want.sum(-1, keepdim=True)).abs() <= ROUNDING).all()


def test_a_models_own_change_of_the_logits_is_made_at_each_row_and_key():
    query, key = torch.randn(2, 2, 4, 100, 16, generator=torch.Generator().manual_seed(0))
    grid = Grid(2, 4, 100, 100, BLOCK, query.device)
    adjust = change_of_logits(grid, lambda x, b, h, q, kv: torch.tanh(x) * (1 + h) - (q - kv).abs() * 0.01)

    def change(logits, places):
        far = (places[:, None] - torch.arange(100)).abs() * 0.01
        return torch.tanh(logits) * (1 + torch.arange(4).view(-1, 1, 1)) - far

    want = exact(query, key, torch.ones(100, 100, dtype=torch.bool), BLOCK, held(100, BLOCK), change)
    after = last(query, key, NO_MASK, 2 * BLOCK, adjust=adjust)[1][:, :, -2:]
    assert ((after - want / want.sum(-1, keepdim=True)).abs() <= ROUNDING).all()


def test_unlike_questions_in_one_block_each_find_their_key():
    """What the rows are for: the mean of unlike queries looks at nothing that any of them looks at."""
    generator = torch.Generator().manual_seed(0)
    length, dim = 16 * 128, 64
    query, key = 0.1 * torch.randn(2, 1, 1, length, dim, generator=generator)
    wanted = {length - 21: 3, length - 13: 7, length - 5: 10}  # every fourth row of a whole block is one of 64
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    for axis, (row, block) in zip(axes, wanted.items(), strict=False):
        query[0, 0, row], key[0, 0, block * 128 + 40] = 40 * axis, 8 * axis
        query[0, 0, row - 1] = -40 * axis
    mask = IndexMask(causal())
    kept = {}
    for rows in (0, 64, 256):
        config = OmniSparseConfig(last_rows=rows, budget=3 * 128, lazy_threshold=None, window_size=128, sink_size=0)
        kept[rows] = select_blocks(query, key, mask, config, target=0.9, scale=dim**-0.5).keep[0, 0, -1]
    assert all(kept[rows][block] for block in wanted.values() for rows in (64, 256))
    assert not any(kept[0][block] for block in wanted.values())


def test_the_cost_of_the_rows_is_counted():
    query = torch.randn(1, 2, 1000, 16, generator=torch.Generator().manual_seed(0))
    mask = IndexMask(causal())
    cost = {}
    for rows in (0, 64):
        config = OmniSparseConfig(budget="per_head", last_rows=rows)
        chosen = select_blocks(query, query, mask, config, target=0.9, scale=0.25)
        found = measure_selection(chosen, query, query, mask, config, scale=0.25, score=None, exact=False)
        cost[rows] = found.stats[STATS.index("selection_blocks")].item()
    # The last two rows of blocks allow 7 + 8 blocks; 32 of 128 queries, and half of a pair's products.
    assert cost[64] - cost[0] == pytest.approx(15 * 0.5 * 32 / 128)


@pytest.mark.parametrize("wrong", [-2, 3, 1.5, True, None])
def test_a_wrong_number_of_rows_is_refused(wrong):
    with pytest.raises(ConfigError, match="last_rows"):
        OmniSparseConfig(budget="per_head", last_rows=wrong)


def test_zero_rows_change_nothing():
    query = torch.randn(1, 2, 600, 16, generator=torch.Generator().manual_seed(0))
    mask = IndexMask(causal())
    chosen = select_blocks(query, query, mask, OmniSparseConfig(budget="per_head", last_rows=0), target=0.9, scale=0.25)
    some = chosen.layout.some
    mass = SCORERS["mean_pool"](
        query, query, some, scale=0.25, block=128, key_block=128, adjust=None, allowed=mask.pairs
    )
    assert torch.equal(chosen.mass, mass)

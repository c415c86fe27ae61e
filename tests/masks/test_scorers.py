"""The estimators of block mass: what each of them owes its callers, and what the row-wise ones really compute."""

import functools
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import config as rules
from omnisparse_flex.attention.trace_mask import trace_mask_mod
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks import tile_pool
from omnisparse_flex.masks.blocks.select import SCORERS, change_of_logits, select_blocks
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import KV, Apply, B, Const, Load, causal
from omnisparse_flex.masks.expr.index_mask import NO_MASK, IndexMask
from omnisparse_flex.testing import AttentionShape, mask_mods
from omnisparse_flex.testing.oracle import materialize_mask
from tests.masks.test_selection import CPU, plain_masks

BLOCK = 32
#: Estimators of mass. ``sampled_rows`` chooses by peaks instead: ``tests/masks/test_peaks.py``.
SCORINGS = tuple(name for name in rules.SCORINGS["block"] if name != "sampled_rows")
#: Side of the blocks that are looked at pair by pair.
SIDE = 8
# Steps of a float32 softmax over S keys, a sum over them and a mean: each rounds once per term at worst.
ROUNDING = 1024 * torch.finfo(torch.float32).eps


def score(name, query, key, mask, *, block=BLOCK, split=1, adjust=None, scale=None):
    grid = Grid(query.shape[0], query.shape[1], query.shape[2], key.shape[2], block, query.device, split)
    some = mask.bounds(grid)[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sides = {"scale": scale, "block": block, "key_block": grid.kv_block}
    return SCORERS[name](query, key, some, adjust=adjust, allowed=mask.pairs, **sides), some


def test_every_scoring_has_a_scorer():
    assert tuple(SCORERS) == SCORINGS  # the peak rule has no scorer of mass


@st.composite
def sites(draw):
    shape = AttentionShape(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from((1, 3))),
        draw(st.integers(1, 150)),
        draw(st.integers(1, 150)),
        8,
    )
    if draw(st.booleans()):
        return shape, draw(plain_masks(shape))[0]
    case = draw(mask_mods(shape.batch, shape.q_len, shape.kv_len))
    return shape, trace_mask_mod(case.mask_mod, CPU)


@pytest.mark.parametrize("name", SCORINGS)
@given(sites(), st.sampled_from((16, 32, 48)), st.sampled_from((1, 2)), st.integers(0, 2**16))
def test_rows_sum_to_one_and_forbidden_blocks_get_nothing(name, site, block, split, seed):
    shape, mask = site
    query, key, _ = shape.inputs(seed=seed)
    mass, some = score(name, 3 * query, key, mask, block=block, split=split)
    assert mass.dtype == torch.float32
    assert mass.shape == (shape.batch, shape.heads, -(-shape.q_len // block), -(-shape.kv_len * split // block))
    assert not (mass * ~some).any() and (mass >= 0).all()
    assert ((mass.sum(-1) - some.any(-1).float()).abs() <= ROUNDING).all()


@pytest.mark.parametrize("name", SCORINGS)
def test_a_planted_heavy_block_is_ranked_first(name):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 256, 16, generator=generator), torch.randn(1, 2, 256, 16, generator=generator)
    heavy = torch.ones(16)
    # Heads 0 and 1 share a KV head and look at opposite directions; heads 2 and 3 at the same.
    query += heavy * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(-1, 1, 1)
    for head, block, sign in ((0, 2, 1.0), (0, 4, -1.0), (1, 5, 1.0)):
        key[:, head, block * BLOCK : (block + 1) * BLOCK] += sign * heavy
    mass, _ = score(name, query, key, NO_MASK)
    for head, block in enumerate((2, 4, 5, 5)):
        assert (mass[0, head].argmax(-1) == block).all()


@pytest.mark.parametrize("name", SCORINGS)
def test_narrow_key_blocks_share_the_mass_of_wide_ones(name):
    if name == "mean_pool":
        pytest.skip("means of fewer keys are other means")
    query, key, _ = AttentionShape(1, 2, 2, 200, 200, 8).inputs()
    wide, _ = score(name, 3 * query, key, NO_MASK, block=64)
    narrow, _ = score(name, 3 * query, key, NO_MASK, block=64, split=2)
    pairs = torch.nn.functional.pad(narrow, (0, -narrow.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1)
    assert torch.allclose(wide, pairs, atol=ROUNDING)


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("rest", [1, 5, 17, 31])
def test_a_ragged_last_block_is_not_diluted_by_its_padding(name, rest):
    # Equal tokens: a block's mass is then its share of the sequence, or of the blocks for block means.
    query, key = torch.ones(1, 1, 2 * BLOCK + rest, 8), torch.ones(1, 1, 2 * BLOCK + rest, 8)
    mass, _ = score(name, query, key, NO_MASK)
    expected = torch.tensor([1 / 3] * 3 if name == "mean_pool" else [BLOCK, BLOCK, rest]).float()
    assert torch.allclose(mass[0, 0], (expected / expected.sum()).expand(3, 3), atol=ROUNDING)
    # Strong keys, one per block: as strong in the last one as in the others.
    key = torch.zeros_like(key)
    key[:, :, 2 * BLOCK :] = 5.0
    assert (score(name, query, key, NO_MASK, scale=1.0)[0][0, 0].argmax(-1) == 2).all()


@pytest.mark.parametrize("name", SCORINGS)
def test_logits_are_changed_as_the_model_does(name):
    shape = AttentionShape(1, 2, 2, 200, 200, 8)
    query, key, _ = shape.inputs()
    grid = Grid(1, 4, 200, 200, BLOCK, CPU)
    plain = score(name, query, key, NO_MASK)[0]
    same = score(name, query, key, NO_MASK, adjust=change_of_logits(grid, lambda x, b, h, q, kv: x + 7.0))[0]
    assert torch.allclose(plain, same, atol=ROUNDING)
    far = change_of_logits(grid, lambda x, b, h, q, kv: x - (q - kv).abs() * (h + 1.0))
    biased = score(name, query, key, NO_MASK, adjust=far)[0]
    assert (biased[0].argmax(-1) == torch.arange(7)).all(), "the nearest block outweighs all others"
    capped = score(name, 100 * query, key, NO_MASK, adjust=change_of_logits(grid, lambda x, *_: torch.tanh(x) * 0.0))[0]
    assert torch.allclose(capped, score(name, 0 * query, key, NO_MASK)[0], atol=ROUNDING)


@given(sites(), st.integers(0, 2**16))
def test_tiles_of_one_token_give_the_true_block_mass(site, seed):
    shape, mask = site
    query, key, _ = shape.inputs(dtype=torch.float64, seed=seed)
    with mock.patch.object(tile_pool, "TILE", 1):
        mass, _ = score("tile_pool", 3 * query, key, mask, block=SIDE)
    allowed = materialize_mask(lambda *at: mask(*at).to(torch.bool), shape.batch, shape.heads, *shape[3:5])
    exact = (3 * query @ key.repeat_interleave(shape.group, 1).mT) * shape.head_dim**-0.5
    exact = torch.softmax(exact.masked_fill(~allowed, float("-inf")), -1).nan_to_num(0.0)
    for row, column in itertools.product(range(mass.shape[2]), range(mass.shape[3])):
        rows, columns = (slice(i * SIDE, (i + 1) * SIDE) for i in (row, column))
        block, total = exact[:, :, rows, columns].sum((2, 3)), exact[:, :, rows].sum((2, 3))
        known = total > 0
        assert torch.allclose(mass[:, :, row, column][known].double(), (block / total)[known], atol=ROUNDING)


def test_tiles_of_equal_logits_are_exact():
    # Constant inside tiles: their mean is then every logit of the tile.
    tile = tile_pool.TILE
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 10, 8, generator=generator).repeat_interleave(tile, 2) for _ in range(2))
    mass, _ = score("tile_pool", 3 * query, key, NO_MASK, block=2 * tile)
    exact = torch.softmax((3 * query @ key.mT).double() * 8**-0.5, -1).unflatten(-1, (5, 2 * tile)).sum(-1)
    assert torch.allclose(mass.double(), exact.unflatten(2, (5, 2 * tile)).mean(3), atol=ROUNDING)


def test_a_tile_that_looks_far_is_not_hidden_by_its_block():
    # One tile of the last block's queries points at block 0, the others at nothing: their mean points nowhere.
    query, key = torch.zeros(1, 1, 512, 8), torch.zeros(1, 1, 512, 8)
    key[:, :, :128, 0] = 4.0
    query[:, :, 384:416, 0], query[:, :, 416:, 0] = 12.0, -12.0
    share = {name: score(name, query, key, NO_MASK, block=128, scale=1.0)[0][0, 0, 3, 0] for name in SCORINGS}
    assert share["mean_pool"] < 1e-6 and abs(share["tile_pool"] - 0.25) < 1e-3


def test_padded_keys_inside_a_block_get_no_mass():
    valid = (torch.arange(128) >= 64)[None]
    mask = IndexMask(Apply("and", (causal(Const(0)), Load(0, (B, KV)))), (valid,))
    query, key, _ = AttentionShape(1, 1, 1, 128, 128, 8).inputs()
    loud = key.masked_fill(~valid[:, None, :, None], 50.0)
    assert torch.equal(score("tile_pool", query, key, mask)[0], score("tile_pool", query, loud, mask)[0])


def test_activations_that_are_not_finite_leave_a_legal_estimate():
    query, key, _ = AttentionShape(1, 1, 1, 96, 96, 8).inputs()
    query[:, :, 39] = float("nan")
    mass, some = score("tile_pool", query, key, IndexMask(causal(Const(0))))
    assert torch.isfinite(mass).all() and not (mass * ~some).any()
    assert torch.allclose(mass.sum(-1), torch.ones(3), atol=ROUNDING)


@pytest.mark.parametrize("name", SCORINGS)
def test_no_tensor_over_all_pairs(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    tokens = 1024
    run = functools.partial(score, name, mask=IndexMask(causal(Const(0))), block=128)
    graph = make_fx(lambda q, k: run(q, k)[0])(torch.randn(1, 2, tokens, 8), torch.randn(1, 1, tokens, 8))
    sizes = [n.meta["val"].numel() for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    # Two heads: all pairs would be 2 * N^2; a row of every block is 1 / 128 of that.
    assert max(sizes) <= max(2 * tokens * tokens // 128, 2 * tokens * 8)


@torch.no_grad()
def test_under_compile_at_several_lengths():
    config = OmniSparseConfig(scoring="tile_pool", lazy_threshold=None, sink_size=1, window_size=1)

    def select(query, key):
        chosen = select_blocks(query, key, IndexMask(causal()), config, target=0.6, scale=0.3)
        return chosen.keep, chosen.mass

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True, dynamic=True)
    # Exact last rows specialise the number of blocks up to three: longer ones share a graph.
    for tokens in (513, 700):
        query, key, _ = AttentionShape(1, 2, 2, tokens, tokens, 16).inputs(seed=tokens)
        keep, mass = compiled(4 * query, key)
        expected = select(4 * query, key)
        assert torch.allclose(mass, expected[1], atol=ROUNDING)
        assert (keep != expected[0]).float().mean() < 0.02, "only ties within rounding may fall otherwise"

"""The one-pass estimator: its definition as a loop, the case in which it is exact, and what it must rank first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.select import BLOCK, grid_of
from omnisparse_flex.masks.expr.expr import Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.tokens.column_mass import column_mass
from omnisparse_flex.masks.tokens.one_pass import GUESS_POOL, one_pass
from omnisparse_flex.masks.tokens.segments import pack_rows, segment_layout, tokens_of_blocks
from omnisparse_flex.testing import AttentionShape
from omnisparse_flex.testing.oracle import dense_logits

CONFIG = OmniSparseConfig(granularity="token", segment_size=128, sink_size=8, window_size=16)
SHAPES = [AttentionShape(1, 2, g, 700, 700, 16) for g in (1, 2, 7)] + [AttentionShape(2, 1, 2, 130, 520, 16)]


def situation(query, key, seed=0):
    """Arguments of an estimator under plain causality, a random half of the queries active."""
    offset = key.shape[2] - query.shape[2]
    mask = IndexMask(causal(Const(offset)))
    layout = block_layout(mask, grid_of(query, key), CONFIG, q_offset=offset)
    segments = segment_layout(layout, CONFIG.segment_size // BLOCK, key.shape[1])
    active = torch.rand(query.shape[:3], generator=torch.Generator().manual_seed(seed)) < 0.5
    logits = dense_logits(query, key)
    places = torch.arange(query.shape[2])
    near = tokens_of_blocks(segments.forced, BLOCK, key.shape[2])[:, :, places // CONFIG.segment_size]
    near = near & (torch.arange(key.shape[2]) <= places[:, None] + offset)
    near_lse = logits.masked_fill(~near, -torch.inf).logsumexp(-1).float()
    rows, count = pack_rows(active, key.shape[1], CONFIG.segment_size)
    given = {"block": BLOCK, "scale": query.shape[-1] ** -0.5, "pairs": None, "score": None}
    return (query, key, near_lse, segments.eligible, rows, count, CONFIG), given, active, logits


def by_loops(arguments, active, logits):
    """The definition, a row at a time in float64."""
    query, key, near_lse, eligible, *_ = arguments
    group, (batch, kv_heads, kv_len, _) = query.shape[1] // key.shape[1], key.shape
    mass = torch.zeros(batch, kv_heads, eligible.shape[2], kv_len, dtype=torch.float64)
    kept = torch.zeros(batch, kv_heads, eligible.shape[2], dtype=torch.float64)
    for b, h, i in active.nonzero().tolist():
        segment = i // CONFIG.segment_size
        own = tokens_of_blocks(eligible[0, 0, segment], BLOCK, kv_len)
        row, near = logits[b, h, i], near_lse[b, h, i].double()
        guess = near.exp()
        for start in range(0, kv_len, GUESS_POOL):
            if own[start]:
                mean = key[b, h // group, start : start + GUESS_POOL].double().mean(0)
                guess += GUESS_POOL * (query[b, h, i].double() @ mean * query.shape[-1] ** -0.5).exp()
        mass[b, h // group, segment] += torch.where(own, (row.exp() / guess).clamp(max=1.0), 0.0)
        kept[b, h // group, segment] += near.exp() / guess
    total = mass.sum(-1) + kept
    return mass / total.clamp(min=1e-30).unsqueeze(-1), kept / total.clamp(min=1e-30)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_definition(shape):
    query, key, _ = shape.inputs()
    arguments, given, active, logits = situation(query * 2, key)
    got = one_pass(*arguments, **given)
    for actual, expected in zip(got, by_loops(arguments, active, logits), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-4)
    assert (got[0] > 0).any(), "a test of nothing"


@given(st.sampled_from(SHAPES), st.integers(0, 2**16))
def test_the_mass_sums_to_one_and_keeps_to_what_is_eligible(shape, seed):
    query, key, _ = shape.inputs(seed=seed)
    arguments, given, *_ = situation(query * 3, key, seed)
    mass, kept = one_pass(*arguments, **given)
    eligible = tokens_of_blocks(arguments[3], BLOCK, shape.kv_len)
    assert (mass >= 0).all() and not mass.masked_select(~eligible.expand_as(mass)).any()
    torch.testing.assert_close(mass.sum(-1) + kept, (arguments[5] > 0).float())


def test_it_is_exact_where_the_guess_is():
    """Keys that are equal within a mean: the mean stands for them without error."""
    query, key, _ = AttentionShape(1, 2, 2, 700, 704, 16).inputs()
    key = key.unflatten(2, (-1, GUESS_POOL))[:, :, :, :1].expand(-1, -1, -1, GUESS_POOL, -1).flatten(2, 3)
    arguments, given, *_ = situation(query, key)
    for actual, expected in zip(one_pass(*arguments, **given), column_mass(*arguments, **given), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_a_planted_key_is_first():
    query, key, _ = AttentionShape(1, 1, 2, 700, 700, 16).inputs()
    query[..., 0], key[:, :, 300, 0] = 4.0, 9.0
    arguments, given, *_ = situation(query, key)
    mass, _ = one_pass(*arguments, **given)
    assert (mass[0, 0, 4:].argmax(-1) == 300).all()


def test_a_segment_without_active_rows_has_no_mass():
    query, key, _ = AttentionShape(1, 1, 1, 700, 700, 16).inputs()
    (*front, count, config), given, *_ = situation(query, key)
    count = count.index_fill(2, torch.tensor([3]), 0)
    mass, kept = one_pass(*front, count, config, **given)
    assert not mass[0, 0, 3].any() and not kept[0, 0, 3].any() and mass[0, 0, 4].any()


def test_a_broken_key_is_kept_and_breaks_no_other():
    query, key, _ = AttentionShape(1, 1, 1, 700, 700, 16).inputs()
    arguments, given, *_ = situation(query, key)
    whole, _ = one_pass(*arguments, **given)
    broken = key.clone()
    broken[0, 0, 200] = torch.nan
    mass, _ = one_pass(arguments[0], broken, *arguments[2:], **given)
    assert (mass[0, 0, 4:, 200] == 1.0).all() and mass.isfinite().all()
    others = torch.arange(700) != 200
    # The broken key's own mean is smaller, and what it had is shared out.
    assert (mass[..., others].argsort(-1)[..., -20:] == whole[..., others].argsort(-1)[..., -20:]).float().mean() > 0.8

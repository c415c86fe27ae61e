"""The arithmetic of budgets and lazy rows against loops that say what it means."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.masks.blocks.block_lists import block_lists, block_mask_from_maps
from omnisparse_flex.masks.blocks.budget import keep_top, need, rank, shared_budget
from omnisparse_flex.masks.blocks.lazy import LAZY_STRIDE, REDUNDANCY_THRESHOLD, active_rows
from omnisparse_flex.masks.expr.index_mask import NO_MASK


@st.composite
def rows(draw):
    """Mass (R, N) in steps of 1/64, whose sums are exact in float32, and which units may be chosen."""
    count, units = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    steps = draw(st.lists(st.integers(0, 8), min_size=count * units, max_size=count * units))
    eligible = draw(st.lists(st.booleans(), min_size=count * units, max_size=count * units))
    return torch.tensor(steps).view(count, units) / 64, torch.tensor(eligible).view(count, units)


@given(rows(), st.integers(0, 64), st.integers(1, 64), st.booleans())
def test_need_is_the_fewest_units_that_reach_the_target(drawn, kept, target, as_tensor):
    mass, eligible = drawn
    target = target / 64
    sorted_mass, _ = rank(mass, eligible)
    kept_mass = torch.full((len(mass),), kept / 64)
    goal = torch.tensor(target) if as_tensor else target
    needs = need(sorted_mass, kept_mass, eligible.sum(-1), goal)
    for row in range(len(mass)):
        best = sorted(mass[row][eligible[row]].tolist(), reverse=True)
        wanted = target * (kept / 64 + sum(best))
        enough = [n for n in range(len(best) + 1) if kept / 64 + sum(best[:n]) >= wanted]
        assert needs[row] == (len(best) if target >= 1 else enough[0])


@given(rows())
def test_rank_sorts_what_is_eligible_first(drawn):
    mass, eligible = drawn
    sorted_mass, order = rank(mass, eligible)
    for row in range(len(mass)):
        best = sorted(mass[row][eligible[row]].tolist(), reverse=True)
        assert sorted_mass[row].tolist() == best + [0.0] * (mass.shape[1] - len(best))
        assert sorted(order[row].tolist()) == list(range(mass.shape[1]))
        assert eligible[row][order[row]].tolist() == [True] * len(best) + [False] * (mass.shape[1] - len(best))


@given(rows(), st.integers(0, 14))
def test_keep_top_keeps_the_heaviest(drawn, budget):
    mass, eligible = drawn
    _, order = rank(mass, eligible)
    kept = keep_top(order, eligible, torch.full((len(mass),), budget))
    assert not (kept & ~eligible).any()
    for row in range(len(mass)):
        best = sorted(mass[row][eligible[row]].tolist(), reverse=True)
        assert sorted(mass[row][kept[row]].tolist(), reverse=True) == best[:budget]


NEEDS = torch.tensor([[[3, 0, 5], [1, 2, 9]]])
ACTIVE = torch.tensor([[[True, True, False], [True, False, False]]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("flattest_head", [[3, 0, 0], [3, 0, 0]]),  # a lazy head's wish does not count, and it gets nothing
        ("per_head", [[3, 0, 0], [1, 0, 0]]),
        (4, [[4, 4, 0], [4, 0, 0]]),
        (0, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_shared_budget(rule, expected):
    assert shared_budget(NEEDS, ACTIVE, rule).tolist() == [expected]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**16), st.none() | st.floats(0, 1))
def test_active_rows(count, heads, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, heads, 1, 6, generator=generator)
    pooled = base + 0.8 * torch.randn(1, heads, count, 6, generator=generator)
    local = torch.rand(1, heads, count, generator=generator)
    text = torch.rand(1, 1, count, generator=generator) < 0.2
    active, lazy = active_rows(pooled, local, text, threshold)
    for head in range(heads):
        for row in range(count):
            leader = row - row % LAZY_STRIDE
            redundancy = float(F.cosine_similarity(pooled[0, head, row], pooled[0, head, leader], dim=0))
            if abs(redundancy - REDUNDANCY_THRESHOLD) < 1e-5:
                continue  # a tie within rounding
            looks_near = threshold is not None and 1 - local[0, head, row] < threshold
            expected = bool(looks_near and redundancy >= REDUNDANCY_THRESHOLD and not text[0, 0, row])
            assert lazy[0, head, row] == expected
            assert active[0, head, row] == (not expected or row == leader)


def test_text_and_leaders_are_active_even_when_everything_looks_near():
    count = 2 * LAZY_STRIDE + 3
    text = torch.arange(count)[None, None] == 5
    active, lazy = active_rows(torch.ones(1, 1, count, 4), torch.ones(1, 1, count), text, 1.0)
    assert active[0, 0].nonzero().flatten().tolist() == [0, 5, LAZY_STRIDE, 2 * LAZY_STRIDE]
    assert not lazy[0, 0, 5]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_block_lists_name_the_kept_blocks_in_order(rows, columns, seed):
    keep = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    counts, indices = block_lists(keep)
    assert counts.dtype == indices.dtype == torch.int32
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(rows)).tolist():
        kept = keep[0][tuple(at)].nonzero().flatten().tolist()
        listed = indices[0][tuple(at)].tolist()
        assert counts[0][tuple(at)] == len(kept) and listed[: len(kept)] == kept
        assert set(listed) <= set(range(columns)), "what follows must stay inside the sequence"


@pytest.mark.parametrize("transposed", [True, False])
def test_transposed_lists_are_made_for_training_only(transposed):
    maps = torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    block_mask = block_mask_from_maps(*maps, NO_MASK.pairs, (200, 200), 128, transposed=transposed)
    assert (block_mask.q_indices is not None) == transposed


def test_a_running_sum_that_misses_one_still_keeps_all():
    # The reason for the rule "a target of 1 keeps all": float32 sums stop short of 1 in many rows.
    mass = torch.softmax(torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), -1).sort(descending=True)[0]
    assert (mass.cumsum(-1)[:, -1] < 1).any()
    count = torch.full((64,), 50)
    assert need(mass, torch.zeros(64), count, 1.0).eq(50).all()
    assert need(mass, torch.zeros(64), count, torch.tensor(math.nextafter(1, 2))).eq(50).all()

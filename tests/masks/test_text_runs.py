"""Which text is always kept: against loops over runs, whatever comes later, and on the layout of a video model."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks import text_runs
from omnisparse_flex.masks.blocks.layout import block_layout
from omnisparse_flex.masks.blocks.text_runs import LONG_RUN, text_blocks
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import KV, Apply, B, Const, Load, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

CPU = torch.device("cpu")
BLOCK = 8
#: Nothing is near but a query's own position.
BARE = OmniSparseConfig(sink_size=0, window_size=1)


@st.composite
def rows(draw, most=90):
    """One row of runs, of text and of a video in turn."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    first = draw(st.booleans())
    kinds = itertools.cycle((first, not first))
    return [kind for kind, length in zip(kinds, lengths, strict=False) for _ in range(length)][:most]


def kept_text(visual, long):
    """bool (N, N): text key j that query i keeps for its own sake, by the definition, run by run."""
    count = len(visual)
    runs = [list(run) for _, run in itertools.groupby(range(count), key=lambda i: visual[i])]
    kept = torch.zeros(count, count, dtype=torch.bool)
    for run in runs:
        if visual[run[0]]:
            continue
        always = not any(visual[: run[0]]) or not any(visual[run[-1] :]) or len(run) >= long
        for i in range(count):
            if always or i in run:
                kept[i, run] = True
    return kept


def layout(visual, config=BARE, *, queries=None, block=BLOCK, long=LONG_RUN):
    length = visual.shape[1]
    queries = length if queries is None else queries
    offset = length - queries
    mask = IndexMask(causal(Const(offset)))
    grid = Grid(visual.shape[0], 2, queries, length, block, CPU)
    with mock.patch.object(text_runs, "LONG_RUN", long):
        return block_layout(mask, grid, config, visual=visual, q_offset=offset)


@given(st.lists(rows(), min_size=1, max_size=2), st.sampled_from((5, 8, 12)), st.integers(0, 40))
def test_blocks_hold_the_text_that_the_definition_keeps(drawn, long, past):
    length = min(len(row) for row in drawn)
    past = min(past, length - 1)
    visual = torch.tensor([row[:length] for row in drawn])
    found = layout(visual, queries=length - past, long=long)
    near = found.near[0, 0]
    for row, forced in zip(visual.tolist(), found.forced[:, 0], strict=True):
        pairs = (kept_text(row, long) & torch.ones(length, length, dtype=torch.bool).tril())[past:]
        # A block of queries before whose end nothing is visual sees a prompt of text.
        shown = torch.tensor(row).cumsum(0)[past:]
        for q, (rows_of, seen) in enumerate(zip(pairs.split(BLOCK), shown.split(BLOCK), strict=True)):
            want = torch.stack([x.any() for x in rows_of.split(BLOCK, 1)]) & (seen[-1] > 0)
            assert torch.equal(forced[q], near[q] | want), (row, q)


@given(rows(), st.sampled_from((5, 8, 12)), st.data())
def test_nothing_depends_on_later_tokens(row, long, data):
    """Whole prefill, cut after any whole number of blocks, is prefill in chunks."""
    whole = layout(torch.tensor([row]), long=long)
    blocks = len(row) // BLOCK
    if blocks == 0:
        return
    cut = data.draw(st.integers(1, blocks))
    start = data.draw(st.integers(0, cut - 1))
    chunk = layout(torch.tensor([row[: cut * BLOCK]]), queries=(cut - start) * BLOCK, long=long)
    for name in ("forced", "eligible", "some"):
        assert torch.equal(getattr(chunk, name), getattr(whole, name)[..., start:cut, :cut]), name


@given(rows(), st.integers(1, 4))
def test_one_row_does_not_change_another(row, batch):
    visual = torch.tensor([row])
    other = torch.cat([visual, torch.rand(batch, len(row)) < 0.5])
    both, alone = layout(other, long=8), layout(visual, long=8)
    assert torch.equal(both.forced[:1], alone.forced) and torch.equal(both.text_rows[:1], alone.text_rows)


def test_a_row_without_a_video_keeps_no_text_for_its_own_sake():
    visual = torch.zeros(2, 64, dtype=torch.bool)
    visual[1, 20:40] = True
    found = layout(visual)
    assert torch.equal(found.forced[0], found.near[0].expand_as(found.forced[0])) and not found.text_rows[0].any()
    assert found.forced[1].sum() > found.near[0].sum() and found.text_rows[1].any()


def test_padding_on_the_left_is_part_of_the_head():
    real = torch.arange(96) >= torch.tensor([[0], [37]])
    visual = torch.zeros(2, 96, dtype=torch.bool)
    visual[:, 48:80] = True
    mask = IndexMask(Apply("and", (causal(Const(0)), Load(0, (B, KV)))), (real,))
    found = block_layout(mask, Grid(2, 1, 96, 96, BLOCK, CPU), BARE, visual=visual)
    last = found.forced[:, 0, -1]
    assert last[0, :6].all() and not last[1, :4].any() and last[1, 4:6].all()


def test_queries_of_short_runs_are_not_active_by_rule():
    visual = torch.ones(1, 96, dtype=torch.bool)
    visual[:, :4] = visual[:, 34:38] = visual[:, 90:] = False  # head, a timestamp, tail
    rows_of = layout(visual).text_rows[0, 0].tolist()
    assert rows_of == [True] + [False] * 10 + [True]


def test_a_decoded_token_keeps_the_question_it_belongs_to():
    visual = torch.ones(1, 200, dtype=torch.bool)
    visual[:, 150:] = False
    blocks = text_blocks(visual, Grid(1, 1, 1, 200, BLOCK, CPU), torch.tensor([199]))
    assert blocks.keys[0, 0, 0].tolist() == [False] * 18 + [True] * 7
    # The same with another video after it: 50 tokens of an old question are a short run.
    later = torch.cat([visual, torch.ones(1, 40, dtype=torch.bool)], 1)
    assert not text_blocks(later, Grid(1, 1, 1, 240, BLOCK, CPU), torch.tensor([239])).keys.any()


@given(rows(), st.integers(1, 40))
def test_room_in_a_cache_changes_nothing(row, room):
    """Keys past what is known to be visual, which no query sees yet."""
    visual = torch.tensor([row])
    alone, length = layout(visual, long=8), len(row)
    grid = Grid(1, 2, length, length + room, BLOCK, CPU)
    with mock.patch.object(text_runs, "LONG_RUN", 8):
        found = block_layout(IndexMask(causal()), grid, BARE, visual=visual)
    blocks = alone.some.shape[-1]
    for name in ("some", "forced", "eligible"):
        wide = getattr(found, name)
        assert torch.equal(wide[..., :blocks], getattr(alone, name)) and not wide[..., blocks:].any(), name


@pytest.mark.slow
@torch.no_grad()
def test_in_a_compiled_graph_at_several_lengths():
    def run(visual):
        grid = Grid(visual.shape[0], 2, visual.shape[1], visual.shape[1], 128, CPU)
        found = block_layout(IndexMask(causal()), grid, OmniSparseConfig(), visual=visual)
        return found.forced, found.text_rows

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for length in (700, 1100, 1300):
        visual = (torch.arange(length) % 75 > 9).repeat(2, 1)
        visual[1, 300:500] = False
        assert all(torch.equal(a, b) for a, b in zip(compiled(visual), run(visual), strict=True))

"""The peak rule: what it chooses by definition, what has no say in it, and the recall that it reports."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.layout import own_positions
from omnisparse_flex.masks.blocks.peak import CANDIDATE, KAPPA, LOWEST
from omnisparse_flex.masks.blocks.peak_rows import PHASES, ROWS, live_rows, row_of
from omnisparse_flex.masks.blocks.select import BLOCK, BlockSelection, grid_of, select_blocks
from omnisparse_flex.masks.expr.expr import KV, Apply, B, Const, H, Load, Q, causal, conjunction
from omnisparse_flex.masks.expr.index_mask import IndexMask

RULES = OmniSparseConfig(target_recall=0.3, key_block=128, window_size=64, last_rows=0)
DIM = 16
SCALE = 3 * DIM**-0.5


def tokens(batch, heads, kv_heads, q_len, kv_len, seed=0):
    """Queries and keys that are alike in a block, so that a block looks at few others."""
    generator = torch.Generator().manual_seed(seed)

    def alike(heads, length, block):
        theme = torch.randn(batch, heads, -(-length // block), DIM, generator=generator)
        noise = 0.4 * torch.randn(batch, heads, length, DIM, generator=generator)
        return theme.repeat_interleave(block, 2)[:, :, :length] + noise

    return alike(heads, q_len, 128), alike(kv_heads, kv_len, 64)


def select(query, key, config=RULES, mask=None, offset=0, min_peak=0.35, floor=None, score=None) -> BlockSelection:
    mask = IndexMask(causal(Const(offset))) if mask is None else mask
    target = config.recall_of(0) if floor is None else floor
    return select_blocks(
        query, key, mask, config, target=target, scale=SCALE, q_offset=offset, min_peak=min_peak, score=score
    )


def padded(batch, kv_len, starts, offset=0):
    """Causality over keys from ``starts`` on."""
    real = torch.arange(kv_len) >= torch.tensor(starts)[:, None]
    return IndexMask(conjunction(causal(Const(offset)), Load(0, (B, KV))), (real.expand(batch, -1).contiguous(),))


def by_definition(query, key, selection, mask, config, *, offset, min_peak, floor, score=None):
    """The rule read row by row, in float64: bool (B, Hq, NQ, NK) chosen, and the witness rows' recall."""
    layout, width = selection.layout, config.key_block
    batch, heads, q_len, _ = query.shape
    kv_len, blocks = key.shape[2], selection.keep.shape[3]
    b, h, q, kv = torch.meshgrid(*(torch.arange(n) for n in (batch, heads, q_len, kv_len)), indexing="ij")
    wide = key.double().repeat_interleave(heads // key.shape[1], 1)
    logits = query.double() @ wide.transpose(-1, -2) * SCALE
    logits = logits if score is None else score(logits, b, h, q, kv)
    logits = logits.masked_fill(~mask.pairs(b, h, q, kv), -math.inf)
    means = torch.stack([part.mean(2) for part in wide.split(width, 2)], 2)
    shape = (batch, heads, *selection.keep.shape[2:])
    full, some, forced = (x.expand(shape) for x in (layout.full, layout.some, layout.forced))
    grid = grid_of(query, key, config.split)
    live = live_rows(mask, grid, own_positions(grid, offset))
    chosen, recall = torch.zeros(shape, dtype=torch.bool), torch.ones(shape[:3])
    rows = torch.stack([row_of(live, r, 0, heads, offset // BLOCK).expand(shape[:3]) for r in range(ROWS)], -1)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in shape[:3])).tolist():
        if live.count.expand(shape[:3])[tuple(at)] == 0:
            continue
        where = tuple(at)
        base = min(min_peak, KAPPA / max(int(some[where].sum()), 1)) if floor < 1 else 0.0
        mine = rows[where]
        z = query[where[:2]].double()[mine] @ means[where[:2]].T * SCALE + math.log(width)
        z = z.masked_fill(~full[where], -math.inf)
        pooled = torch.softmax(z, -1).nan_to_num(0.0)
        own = forced[where] | (some[where] & (~full[where] | (pooled >= base * CANDIDATE).any(0)))
        logs = torch.stack([x.logsumexp(-1) for x in logits[where[:2]][mine].split(width, -1)], -1)
        mixed = torch.where(own, logs, z)
        share = torch.where(own, (mixed - mixed.logsumexp(-1, keepdim=True)).exp().nan_to_num(0.0), 0.0)
        for row in share:
            always, far = row[forced[where]].sum(), row.masked_fill(forced[where], 0.0)
            reaching = [2.0**e for e in range(0, LOWEST - 1, -1) if always + far[far >= 2.0**e].sum() >= floor]
            chosen[where] |= (row >= min(base, max(reaching, default=0.0))) & own & some[where] & ~forced[where]
        exact = torch.softmax(logs[-1], -1)
        recall[where] = float((exact * (chosen[where] | forced[where])).sum()) if exact.isfinite().all() else 1.0
    assert blocks == shape[3]
    return chosen, recall


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.sampled_from((1, 2)), st.sampled_from((1, 3)), st.integers(1, 600), st.integers(0, 300),
    st.sampled_from((64, 128)), st.floats(0.001, 0.9), st.floats(0.05, 0.99), st.integers(0, 99),
)  # fmt: skip
def test_it_chooses_what_its_definition_says(batch, kv_heads, group, q_len, cached, width, min_peak, floor, seed):
    query, key = tokens(batch, kv_heads * group, kv_heads, q_len, q_len + cached, seed)
    config = dataclasses.replace(RULES, key_block=width)
    mask, rule = IndexMask(causal(Const(cached))), {"offset": cached, "min_peak": min_peak, "floor": floor}
    made = select(query, key, config, mask, **rule)
    chosen, recall = by_definition(query, key, made, mask, config, **rule)
    # Shares that rounding may put on either side of a threshold are too rare in so few blocks to be drawn.
    assert torch.equal(made.keep, chosen | made.layout.forced)
    torch.testing.assert_close(made.recall, recall.float(), atol=1e-4, rtol=0)


def packed_ids(kv_len):
    return torch.tensor([[0] * (kv_len // 3) + [1] * (kv_len - kv_len // 3)])


def masks(kv_len):
    document = Apply("eq", (Load(0, (B, Q)), Load(0, (B, KV))))
    banded = Apply("gt", (KV, Apply("sub", (Q, Const(200)))))
    by_head = Apply("ge", (KV, Apply("mul", (H, Const(40)))))
    return {
        "padded": padded(1, kv_len, [150]),
        "packed": IndexMask(conjunction(causal(), document), (packed_ids(kv_len),)),
        "window": IndexMask(conjunction(causal(), banded)),
        "by head": IndexMask(conjunction(causal(), by_head)),
        "no order": IndexMask(Const(True)),
    }


@pytest.mark.parametrize("name", masks(1))
@pytest.mark.parametrize("changed", [False, True])
def test_it_holds_under_other_masks_and_changes_of_the_logits(name, changed):
    query, key = tokens(1, 4, 2, 500, 500)
    mask = masks(500)[name]
    score = (lambda x, b, h, q, kv: torch.tanh(x / 3) * 3 - (q - kv).abs() * 0.01 * (h + 1)) if changed else None
    config = dataclasses.replace(RULES, key_block=64)
    made = select(query, key, config, mask, floor=0.5, score=score)
    if not changed:
        rule = {"offset": 0, "min_peak": 0.35, "floor": 0.5}
        chosen, recall = by_definition(query, key, made, mask, config, **rule)
        assert torch.equal(made.keep, chosen | made.layout.forced)
        torch.testing.assert_close(made.recall, recall.float(), atol=1e-4, rtol=0)
    assert not (made.keep & ~made.layout.some).any()
    assert ((made.recall >= 0) & (made.recall <= 1 + 1e-5)).all()


@settings(max_examples=20)
@given(st.floats(0.0, 0.5), st.floats(0.0, 0.5), st.floats(0.05, 1.0), st.integers(200, 700), st.integers(0, 9))
def test_raising_min_peak_never_adds_a_block(low, high, floor, length, seed):
    low, high = sorted((low, high))
    query, key = tokens(1, 2, 1, length, length, seed)
    config = dataclasses.replace(RULES, key_block=64)
    few, many = (select(query, key, config, min_peak=x, floor=floor).keep for x in (high, low))
    assert not (few & ~many).any()


def test_raising_the_floor_never_drops_a_block():
    query, key = tokens(1, 4, 2, 700, 700)
    kept = [select(query, key, min_peak=0.8, floor=floor).keep for floor in (0.1, 0.5, 0.9, 0.99)]
    assert all(not (few & ~many).any() for few, many in itertools.pairwise(kept))
    assert kept[0].sum() < kept[-1].sum()


@pytest.mark.parametrize("rule", [{"min_peak": 0.0}, {"floor": 1.0}, {"min_peak": torch.tensor(0.0)}])
def test_nothing_to_leave_out_keeps_everything(rule):
    query, key = tokens(1, 2, 1, 600, 600)
    made = select(query, key, **rule)
    assert torch.equal(made.keep, made.layout.some.expand_as(made.keep))


@settings(max_examples=15)
@given(st.integers(1, 4), st.sampled_from((64, 128)), st.integers(0, 9))
def test_a_chunk_of_a_prompt_selects_what_the_whole_prompt_does(chunks, width, seed):
    query, key = tokens(1, 4, 2, 650, 650, seed)
    config = dataclasses.replace(RULES, key_block=width)
    whole = select(query, key, config)
    assert whole.keep.sum() < whole.layout.some.sum() * 4
    start = 128 * chunks
    end = min(start + 256, 650)
    part = select(query[:, :, start:end], key[:, :, :end], config, offset=start)
    rows = slice(chunks, chunks + part.keep.shape[2])
    columns = part.keep.shape[3]
    # The last block of a chunk holds the same rows only if it is whole.
    assert torch.equal(part.keep, whole.keep[:, :, rows, :columns])
    torch.testing.assert_close(part.recall, whole.recall[:, :, rows])


def test_rows_at_the_end_of_a_chunk_only_add_blocks():
    query, key = tokens(1, 4, 2, 768, 768)
    grid = grid_of(query, key)
    live = live_rows(IndexMask(causal()), grid, own_positions(grid, 0))
    left_out = select(query, key).keep[0, :, 3, 1].logical_not().nonzero()
    head = int(left_out[0])
    query[0, head, int(row_of(live, 7, PHASES[1], 4, 0)[0, head, 3])] = 9.0  # no row of the first phase
    key[0, head // 2, 150] = 2.0
    config = dataclasses.replace(RULES, last_rows=128)
    whole = select(query, key, config)
    part = select(query[:, :, :512], key[:, :, :512], config)
    assert torch.equal(part.keep[:, :, :2], whole.keep[:, :, :2, :4])
    assert not (whole.keep[:, :, 2:4, :4] & ~part.keep[:, :, 2:4]).any()
    assert part.keep[0, head, 3, 1] and not whole.keep[0, head, 3, 1]


def test_heads_and_batch_rows_do_not_influence_each_other():
    query, key = tokens(2, 6, 2, 640, 640)
    before = select(query, key).keep
    other = query.clone()
    other[0, 1] *= -1
    after = select(other, key).keep
    same = torch.ones(2, 6, dtype=torch.bool)
    same[0, 1] = False
    assert torch.equal(before[same], after[same])


def test_a_peak_of_one_sampled_row_is_kept_and_its_heads_neighbours_fetch_nothing():
    query, key = 0.1 * torch.ones(1, 2, 1280, DIM), torch.zeros(1, 2, 1280, DIM)
    key[0, 0, 300, 0] = 30.0
    grid = grid_of(query, key)
    live = live_rows(IndexMask(causal()), grid, own_positions(grid, 0))
    row = int(row_of(live, 7, 0, 2, 0)[0, 0, 8])
    query[0, 0, row, 0] = 1.0  # logit 11: nearly all of the row
    made = select(query, key, min_peak=0.3, floor=0.01)
    assert made.keep[0, 0, 8, 300 // BLOCK]
    assert made.active[0, 0, 8] and not made.active[0, 1, 8]


def test_sampled_rows_are_live_rows_spread_over_the_block():
    mask, length = padded(1, 400, [140]), 400
    query = torch.zeros(1, 3, length, DIM)
    grid = grid_of(query, query)
    live = live_rows(mask, grid, own_positions(grid, 0))
    assert live.count[0, 0].tolist() == [0, 116, 128, 16]
    rows = torch.stack([row_of(live, r, 0, 3, 0) for r in range(ROWS)], -1)[0]
    assert (rows[:, 1] >= 140).all() and (rows[:, 1] < 256).all()
    assert torch.equal(rows[:, 3].sort(-1).values, torch.arange(384, 400).expand(3, -1))  # all of 16
    steps = rows[:, 2].diff(dim=-1)
    assert ((steps == 8).all(-1)).all() and len(set(rows[:, 2, 0].tolist())) == 3  # shifted by head
    further = torch.stack([row_of(live, r, p, 3, 0) for p in PHASES for r in range(ROWS)], -1)[0, :, 2]
    assert torch.equal(further.sort(-1).values, torch.arange(256, 384).expand(3, -1))  # all phases: every row


def test_rows_that_see_nothing_and_padding_give_zero():
    query, key = tokens(2, 2, 1, 300, 300)
    mask = padded(2, 300, [290, 0])
    made = select(query, key, mask=mask)
    assert torch.equal(made.recall[0, :, :2], torch.ones(2, 2))
    value = torch.randn(2, 1, 300, DIM)
    real = mask.buffers[0]
    out = sparse_attention(
        query, key, value, config=RULES, enable_gqa=True, mask_mod=lambda b, h, q, kv: real[b, kv], scale=SCALE
    )
    assert out.isfinite().all() and torch.equal(out[0, :, :290], torch.zeros(2, 290, DIM))


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 300), (3, 130), (127, 127), (129, 129)])
def test_short_calls_are_dense_where_nothing_can_be_left_out(q_len, kv_len):
    query, key = tokens(1, 2, 2, q_len, kv_len)
    value: Tensor = torch.randn(1, 2, kv_len, DIM)
    config = dataclasses.replace(RULES, target_recall=0.999)
    out = sparse_attention(query, key, value, config=config, scale=SCALE)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    assert (out - dense).abs().max() < 0.05

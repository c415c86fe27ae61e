"""What lies far, by the keys that a segment's leaders look at: its definition, when it is exact, what it sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_one_pass import CONFIG, SHAPES, situation

from omnisparse_flex.masks import leaders
from omnisparse_flex.masks.leaders import leader_rows, looked_at_lse
from omnisparse_flex.masks.pooled_lse import pooled_lse
from omnisparse_flex.masks.queries import LAZY_STRIDE
from omnisparse_flex.masks.segments import tokens_of_blocks
from omnisparse_flex.masks.select import BLOCK
from omnisparse_flex.masks.tokens import active_tokens
from omnisparse_flex.testing import AttentionShape


def looked_at(query, key, **changes):
    """The log-sum-exps, the true ones over all eligible keys, and what is eligible, bool (B, Hq, L, S)."""
    (_, _, near_lse, eligible, *_, config), given, _, logits = situation(query, key)
    places = torch.arange(query.shape[2]) // config.segment_size
    own = tokens_of_blocks(eligible, BLOCK, key.shape[2])[:, :, places]
    own = own.expand(*logits.shape)
    got = looked_at_lse(query, key, near_lse, eligible, config, **{**given, **changes})
    return got, logits.masked_fill(~own, -torch.inf).logsumexp(-1), own


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_exact_where_there_are_few_keys(shape, monkeypatch):
    monkeypatch.setattr(leaders, "LOOKED_AT", 1000)
    query, key, _ = shape.inputs()
    got, true, own = looked_at(query * 2, key)
    torch.testing.assert_close(got.double(), true, atol=1e-5, rtol=1e-5)
    assert own.any() and (got.isinf() == ~own.any(-1)).all()


@given(st.sampled_from(SHAPES), st.integers(0, 2**16))
def test_it_is_a_lower_bound(shape, seed):
    query, key, _ = shape.inputs(seed=seed)
    got, true, _ = looked_at(query * 3, key)
    assert (got <= true + 1e-5).all()


def test_the_keys_are_those_of_the_leaders(monkeypatch):
    """By loops: the mass that a group's leaders give, by guesses of theirs; its heaviest keys; all queries there."""
    monkeypatch.setattr(leaders, "LOOKED_AT", 5)
    query, key, _ = AttentionShape(1, 2, 2, 700, 700, 16).inputs()
    got, _, own = looked_at(query * 3, key)
    (_, _, near_lse, eligible, *_), rules, _, logits = situation(query * 3, key)
    means = pooled_lse(query * 3, key, eligible, 128, block=BLOCK, pool=32, scale=rules["scale"], score=None)
    guess = torch.logaddexp(near_lse, means).double().unsqueeze(-1)
    share = torch.exp(logits - guess).clamp(max=1.0).masked_fill(~own, 0.0)
    for h in range(2):
        for m in range(3, 6):
            part = (0, slice(2 * h, 2 * h + 2), slice(m * 128, min(700, (m + 1) * 128)))
            few = share[part][:, ::LAZY_STRIDE].sum((0, 1)).topk(5).indices
            torch.testing.assert_close(got[part].double(), logits[part][..., few].logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_a_segment_s_leaders_come_first():
    rows, count = leader_rows((2, 3, 4), 512, torch.device("cpu"))
    assert rows.shape == (2, 3, 4, 512) and (count == 512 // LAZY_STRIDE).all()
    assert torch.equal(rows[1, 2, 3, :32], torch.arange(0, 512, LAZY_STRIDE))
    assert torch.equal(rows[0, 0, 0].sort().values, torch.arange(512))


def test_one_loud_key_among_many_is_seen():
    """What means of keys miss: one key in 600 that takes most of every query's mass."""
    query, key, _ = AttentionShape(1, 1, 2, 700, 700, 16).inputs()
    query, key = query * 0.1, key * 0.1
    query[..., 0], key[:, :, 300, 0] = 6.0, 8.0
    got, true, own = looked_at(query, key)
    sees = own[..., 300]
    assert sees.any() and (true - got)[sees].max() < 0.01


def test_the_mask_and_changed_scores_are_read(monkeypatch):
    monkeypatch.setattr(leaders, "LOOKED_AT", 1000)
    query, key, _ = AttentionShape(1, 2, 2, 700, 700, 16).inputs()
    even = lambda b, h, q, kv: (q + kv + h) % 2 == 0  # noqa: E731
    softer = lambda logits, b, h, q, kv: logits - (q - kv) * 0.01 * (h + 1)  # noqa: E731
    got, _, own = looked_at(query, key, pairs=even, score=softer)
    *_, logits = situation(query, key)
    h, q, kv = torch.arange(4).view(1, -1, 1, 1), torch.arange(700).view(1, 1, -1, 1), torch.arange(700)
    wanted = softer(logits, 0, h, q, kv).masked_fill(~(own & even(0, h, q, kv)), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_few_segments_are_those_of_the_whole():
    query, key, _ = AttentionShape(1, 2, 2, 700, 700, 16).inputs()
    whole, *_ = looked_at(query, key)
    (_, _, near_lse, eligible, *_), rules, *_ = situation(query, key)
    parts = []
    for first in range(0, eligible.shape[2], 2):
        own = slice(first * 128, (first + 2) * 128)
        part = (query[:, :, own], key, near_lse[:, :, own], eligible[:, :, first : first + 2], CONFIG)
        parts.append(looked_at_lse(*part, first=first, **rules))
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_nobody_is_lazy_near_a_broken_key():
    query, key, _ = AttentionShape(1, 1, 1, 700, 700, 16).inputs()
    key[0, 0, 200] = torch.nan
    far, _, own = looked_at(query, key)
    assert torch.equal(far.isnan(), own[..., 200])
    text = torch.zeros(1, 700, dtype=torch.bool)
    active, lazy = active_tokens(query.abs(), torch.full_like(far, 9.0), far, text, 1.0)
    assert active[own[..., 200]].all() and lazy[..., :256].any()


def test_who_is_lazy_by_loops():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 50, 4, generator=generator) + 0.7
    near, far = torch.randn(2, 2, 3, 50, generator=generator).unbind(0)
    far[0, 0, 7], text = -torch.inf, torch.rand(2, 50, generator=generator) < 0.2
    active, lazy = active_tokens(query, near, far, text, 0.4)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(50)).tolist():
        leader = i - i % LAZY_STRIDE
        breadth = float(far[b, h, i].exp() / (far[b, h, i].exp() + near[b, h, i].exp()))
        alike = float(torch.cosine_similarity(query[b, h, i], query[b, h, leader], dim=0))
        expected = breadth < 0.4 and alike >= 0.5 and not text[b, i]
        assert bool(lazy[b, h, i]) == expected and bool(active[b, h, i]) == (not expected or i == leader)
    assert lazy.any() and active.any() and (lazy & active).any()


def test_without_a_threshold_all_are_active():
    active, lazy = active_tokens(torch.ones(1, 2, 3, 4), *torch.zeros(2, 1, 2, 3), torch.zeros(1, 3) > 0, None)
    assert active.all() and not lazy.any()

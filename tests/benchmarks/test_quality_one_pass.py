"""The lab's one pass: what its rows are, who knows the lazy queries before it, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.quality.choose import choose, local_pairs
from benchmarks.quality.costs import selection_cost
from benchmarks.quality.estimators import ESTIMATORS, exact
from benchmarks.quality.one_pass import OnePass, top_head_dims
from benchmarks.quality.plans import token
from benchmarks.quality.rows import logits
from tests.benchmarks.test_quality_lab import DIM, SMALL, TOKENS, inputs


def test_one_pass_guesses_the_normaliser_only():
    query, key = inputs()
    rows = ESTIMATORS["one_pass"](query, key, DIM**-0.5, sinks=4, window=8, pool=4, bits8=False)(32, 96)
    assert (rows.triu(33) == 0).all() and (rows <= 1).all() and (rows.sum(-1) != 1).any()
    whole = rows.amax(-1) < 1  # no share was cut off
    truth = exact(query, key, DIM**-0.5)(32, 96)
    torch.testing.assert_close((rows / rows.sum(-1, keepdim=True))[whole], truth[whole])


def test_the_loudest_coordinates_are_those_that_move_the_logits():
    query, key = inputs()
    query[..., 3], key[:, :1, :, 5] = 0.0, 0.0  # in all heads; in one KV head
    narrow = top_head_dims(query, key, DIM - 1)
    assert [x.shape[-1] for x in narrow] == [DIM - 1] * 2
    torch.testing.assert_close(logits(*narrow, 1.0), logits(query, key, 1.0))
    narrow = top_head_dims(query, key, DIM - 2)
    first = slice(0, query.shape[1] // key.shape[1])  # the first KV head's group loses nothing by two dims
    torch.testing.assert_close(logits(*narrow, 1.0)[:, first], logits(query, key, 1.0)[:, first])


def test_few_dims_change_the_pass_and_not_the_local_part():
    query, key = inputs()
    options = {"sinks": 4, "window": 8, "pool": 4, "bits8": False}
    whole, few = (ESTIMATORS["one_pass"](query, key, DIM**-0.5, dims=d, **options)(32, 96) for d in (0, DIM // 2))
    same = ESTIMATORS["one_pass"](query, key, DIM**-0.5, dims=DIM, **options)(32, 96)
    torch.testing.assert_close(same, whole)
    q, k = torch.arange(32, 96)[:, None], torch.arange(96)
    near = ((q - k < 8) | (k < 4)) & (k <= q)
    torch.testing.assert_close(few[..., near], whole[..., near])
    far = (k <= q) & ~near
    assert not torch.allclose(few[..., far], whole[..., far], atol=1e-3)


def test_breadth_is_known_before_the_pass_and_better_with_scatter():
    query, key = inputs()
    truth = exact(query, key, DIM**-0.5)(64, TOKENS)
    q, k = torch.arange(64, TOKENS)[:, None], torch.arange(TOKENS)
    beyond = (truth * ((k >= 4) & (q - k >= 8))).sum(-1)

    def guessed(pool: int, **options: bool) -> Tensor:
        made = OnePass(query, key, DIM**-0.5, sinks=4, window=8, pool=pool, dims=4, **options)
        return made.breadth(64, TOKENS)

    torch.testing.assert_close(guessed(1), beyond)  # a key is its own mean; few dims are the pass's alone
    means, scatter = (guessed(4, scatter=x) for x in (False, True))
    assert (means <= beyond + 1e-5).all(), "a lower bound"
    assert (scatter - beyond).abs().mean() < 0.5 * (means - beyond).abs().mean()


def test_leaders_know_the_keys_that_others_look_at_too():
    query, key = inputs()
    options = {"sinks": 4, "window": 8, "pool": 8, "segment": 32, "bits8": False}
    truth = exact(query, key, DIM**-0.5)(64, TOKENS)
    q, k = torch.arange(64, TOKENS)[:, None], torch.arange(TOKENS)
    beyond = (truth * ((k >= 4) & (q - k >= 8))).sum(-1)
    whole = OnePass(query, key, DIM**-0.5, leaders=TOKENS, **options)
    torch.testing.assert_close(whole.breadth(64, TOKENS), beyond)
    few = OnePass(query, key, DIM**-0.5, leaders=6, **options)
    assert (few.breadth(64, TOKENS) <= beyond + 1e-5).all() and few.early
    # One key that everybody likes.
    key[:, :, 20] = 4 * query.mean((1, 2), keepdim=True).squeeze(2)
    logit = logits(query + 1, key, DIM**-0.5)[:, :, 64:, 20]
    made = OnePass(query + 1, key, DIM**-0.5, leaders=6, **options)
    assert (made.far(64, TOKENS) >= logit - 1e-4).float().mean() > 0.9


def test_what_a_narrow_pass_leaves_out_may_count_by_means():
    query, key = inputs()
    options = {"sinks": 4, "window": 8, "bits8": False}
    whole = OnePass(query, key, DIM**-0.5, pool=1, **options)(64, TOKENS)
    exactly = OnePass(query, key, DIM**-0.5, dims=DIM // 2, rest=True, pool=1, **options)(64, TOKENS)
    torch.testing.assert_close(exactly, whole)
    near, plain = (
        (OnePass(query, key, DIM**-0.5, dims=DIM // 2, rest=x, pool=2, **options)(64, TOKENS) - whole).abs().mean()
        for x in (True, False)
    )
    assert 0 < near < plain


def test_leaders_raise_a_guess_that_is_too_low():
    query, key = inputs()
    options = {"sinks": 4, "window": 8, "pool": 8, "bits8": False, "early": True}
    truth = OnePass(query, key, DIM**-0.5, **{**options, "pool": 1}).far(64, TOKENS)
    low, level = (OnePass(query, key, DIM**-0.5, level=x, **options).far(64, TOKENS) for x in (False, True))
    assert (low - truth).mean() < -0.05 and (level - truth).mean().abs() < 0.3 * (low - truth).mean().abs()
    assert ((level - low).std(2) < 1e-4).all(), "by head, not by row"


def test_lazy_queries_follow_from_what_is_guessed():
    rule = token("x", lazy=0.5, **SMALL)
    mass = exact(*inputs(), DIM**-0.5)(0, TOKENS)
    local, generator = local_pairs(rule, 0, TOKENS, mass.device), torch.Generator()
    none, all_ = (choose(mass, local, rule, 0, generator, torch.full(mass.shape[:3], x)) for x in (0.9, 0.1))
    assert not none.lazy.any() and none.active.all()
    assert all_.lazy.all() and all_.active.float().mean() == 1 / rule.lazy_stride


def test_a_narrow_pass_is_cheap_and_made_for_whom_the_guess_leaves():
    def cost(**options: object) -> float:
        rule = token("x", estimator="one_pass", options={"dims": DIM // 2, "pool": 16, **options})
        return selection_cost(rule, TOKENS, DIM, 1, active=0.5)

    assert cost() == pytest.approx(0.5 * (0.5 / 2 + 1 / 16))
    assert cost(early=True) == pytest.approx(0.5 * (0.5 * 0.5 / 2 + 1 / 16))
    assert cost(early=True, scatter=True) == pytest.approx(0.5 * (0.5 * 0.5 / 2 + 2 / 16))
    assert cost(rest=True) == pytest.approx(0.5 * (0.5 / 2 + 2 / 16))
    assert cost(early=True, level=True) == pytest.approx(0.5 * (0.5 * (0.5 + 1 / 16) / 2 + 1 / 16))
    looked = 0.5 * (0.5 * (0.5 + 1 / 16) / 2 + 1 / 256 + 2 * 8 / TOKENS)
    assert cost(leaders=8) == pytest.approx(looked)

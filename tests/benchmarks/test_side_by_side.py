"""Others' rules as masks: each does what its paper says on a case that can be read, and attention under it is exact."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.quality import own_rules, rivals
from benchmarks.quality.block_masks import Blocks, attend_by_pairs, causal_blocks, sampled_recall
from benchmarks.quality.side_by_side_figures import figures, mean, needed, table
from benchmarks.quality.windows import Window, against_dense, windows_of

LENGTH, SCALE = 1024, 0.25


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2)]


def dense(query, key, value, pairs):
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    allowed = pairs & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return (query @ key.mT * SCALE).masked_fill(~allowed, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("name", rivals.MASKS)
def test_attention_under_every_rule_is_exact(name):
    query, key, value = inputs()
    kept = rivals.MASKS[name](2 * query, key, SCALE)
    out = kept.attend(query, key, value, SCALE)
    pairs = kept.pairs(0, LENGTH).expand(1, 4, -1, -1)
    torch.testing.assert_close(out, dense(query, key, value, pairs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out, attend_by_pairs(kept, query, key, value, SCALE), atol=1e-5, rtol=1e-4)
    assert pairs[:, :, torch.arange(LENGTH), torch.arange(LENGTH)].all(), "every row sees itself"
    assert 0 < kept.share() <= 1
    assert ((sampled_recall(kept, query, key, SCALE) > 0) & (sampled_recall(kept, query, key, SCALE) < 1.0001)).all()


@pytest.mark.parametrize(("name", "low", "high"), [("XAttention", 0.8, 0.95), ("FlexPrefill", 0.9, 0.98)])
def test_more_mass_keeps_more(name, low, high):
    query, key, _ = inputs()
    few, many = (rivals.MASKS[f"{name} {mass}"](query, key, SCALE).keep for mass in (low, high))
    assert few.sum() < many.sum() and not (few & ~many).any()


def test_antidiagonals_of_a_block_that_all_look_at_are_found():
    query, key, _ = inputs()
    query, key = 0.1 * query, 0.1 * key
    query[:, 1, 512:640, 0], key[:, 0, 256:384, 0] = 20.0, 20.0
    kept = rivals.strided_sums(query, key, SCALE, stride=8, mass=0.9).keep
    assert kept[0, 1, 4].tolist() == [True, False, True, False, True, False, False, False]


def test_blocks_near_the_heaviest_one_are_kept():
    query, key = torch.ones(1, 4, LENGTH, 16), torch.zeros(1, 2, LENGTH, 16)
    key[:, :, 256:384, 0], key[:, :, 384:512, 0] = 16.0, 16.0 - 4 * 2.5  # exp(-2.5) of the heaviest
    keep = {alpha: rivals.share_of_maximum(query, key, SCALE, alpha=alpha).keep[0, 0, 5] for alpha in (0.05, 0.1, 0.2)}
    assert all(kept[2] for kept in keep.values())
    scores = rivals.share_of_maximum(query, key, SCALE, alpha=0.05).keep[0, 0, 5]
    assert scores.tolist()[:6] == [True] * 6  # sinks and a window of four blocks besides


def test_columns_and_diagonals_of_the_last_rows_are_kept_in_every_row():
    query, key, _ = inputs()
    key[:, :, 300, 0], query[:, :, -64:, 0] = 40.0, 10.0
    kept = rivals.columns_and_diagonals(query, key, SCALE, rows=64, columns=31, diagonals=101)
    pairs = kept.pairs(0, LENGTH)
    assert pairs[:, :, 301:, 300].all() and pairs[:, :, :, :30].all()
    assert kept.columns.sum(-1).eq(31).all()


def test_the_controls_keep_as_much_as_they_are_asked_to():
    query, key, _ = inputs()
    assert rivals.sinks_and_window(query, key, SCALE, share=0.5).share() >= 0.5
    assert rivals.sinks_and_window(query, key, SCALE, share=0.5).share() < 0.6
    config = own_rules.peak(64, 128)
    own, random = (rivals.chosen_by(9 * query, key, SCALE, config=config, shuffled=x) for x in (False, True))
    assert torch.equal(own.keep.sum(-1), random.keep.sum(-1)) and not torch.equal(own.keep, random.keep)


def test_kept_shares_count_causal_blocks():
    seen = causal_blocks(4, 8, 2, torch.device("cpu"))
    assert seen.sum(-1).tolist() == [2, 4, 6, 8]
    keep = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    keep[..., :2] = True
    assert Blocks(keep, 64).share() == pytest.approx(8 / 20)


def test_a_window_is_judged_against_dense_attention():
    ids = torch.arange(9) % 5
    head, states = torch.nn.Linear(3, 5), torch.randn(8, 3)
    same = against_dense(head, states, states, ids)
    assert same["kl"] == 0 and same["top1"] == 1
    loss = torch.nn.functional.cross_entropy(head(states), ids[1:])
    assert same["nll"] == pytest.approx(loss.item(), rel=1e-5)
    assert against_dense(head, -states, states, ids)["kl"] > 0
    names = [w.name for w in windows_of({"a": torch.arange(20), "b": torch.arange(20)}, 10, 2)]
    assert names == ["10:a:0", "10:b:0", "10:a:1", "10:b:1"]
    assert json.dumps(same) and Window("a", 0, ids).name == "9:a:0"


def test_the_share_that_a_rival_needs_lies_between_its_thresholds():
    points = [(3.0, 0.2), (1.0, 0.4), (2.0, 0.3)]
    assert needed(points, 1.5) == (pytest.approx(0.35), "between measured thresholds")
    assert needed(points, 0.5) == (0.4, "or more: no threshold loses so little")
    assert needed(points, 9.0)[0] == 0.2


def test_figures_compare_like_windows():
    def window(nll, **more):
        return {"nll": nll, "late": nll, "kl": 0.01, "top1": 0.9, "seconds": 1, **more}

    shares = {
        "kept": 0.2,
        "scores": 0.05,
        "recall": 0.9,
        "recall_5th": 0.8,
        "recall_worst_head": 0.7,
        "told_recall": 0.91,
    }
    rows = {
        "dense": {"8192:a:0": window(2.0), "8192:b:0": window(3.0)},
        "peak, 64 keys, window 128": {"way": "library", "8192:a:0": window(2.01)},
        "peak, 64 keys, window 128, as masks": {"8192:a:0": window(2.01, **shares), "8192:b:0": window(3.5, **shares)},
        "XAttention 0.95": {"8192:a:0": window(2.005, kept=0.4)},
        "XAttention 0.9": {"8192:a:0": window(2.015, kept=0.2)},
    }
    found = figures(rows)
    assert found["peak.ppl_delta_pct.8k"][0] == pytest.approx(100 * math.expm1(0.01), abs=1e-3)
    assert found["peak.density.8k"][0] == 0.25 and found["peak.recall_difference.8k"][0] == 0.01
    assert found["peak.kept_over_xattention"][0] == pytest.approx(0.2 / 0.3, abs=0.01)
    assert "| peak, 64 keys, window 128 | 0.200 | 0.250 | +1.01 % | 0.0100 | 0.900 |" in table(rows, 8192)
    assert mean(rows, "nobody", 8192) == {}

"""The cost model: fitted to what was measured, and honest about what was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex import ConfigError, OmniSparseConfig
from omnisparse_flex.backend import Backend
from omnisparse_flex.calibration.fit import Sample, fit
from omnisparse_flex.config import SCORINGS
from omnisparse_flex.cost_model import (
    EXPECTED_SHARE,
    FILE_VARIABLE,
    LAST,
    PACKAGED,
    PEAK_SHARE,
    STEP,
    TENSOR_CODE,
    TOKENS_ON_A_GPU,
    Costs,
    Shape,
    choice_share,
    costs_of,
    expected_share,
    pair_cost,
    user_file,
    write,
)
from omnisparse_flex.masks.blocks.select import select_blocks
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask

#: Estimators of mass. ``sampled_rows`` chooses by peaks instead: ``tests/masks/test_peaks.py``.
COUNTING = tuple(name for name in SCORINGS["block"] if name != "sampled_rows")

#: The rules that count mass.
COUNTED = OmniSparseConfig(budget="per_head")
SHAPE = Shape(8, 2, 64)
GPU = "NVIDIA H200"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TRUE = Costs(dense=2e-11, dense_call=0.05, sparse=3e-11, token=1e-9, block=1e-5, call=0.2)
positive = st.floats(1e-3, 1e3)


def samples(costs, lengths=(1024, 2048, 4096, 8192, 16384), shares=(0.1, 0.3, 0.5)):
    return [
        Sample(n, SHAPE, share, costs.sparse_ms(n, SHAPE, share), costs.dense_ms(n, SHAPE))
        for n in lengths
        for share in shares
    ]


@given(positive, positive, positive, positive)
def test_a_fit_finds_what_made_the_times(dense, sparse, token, call):
    costs = Costs(dense * 1e-11, 0.1, sparse * 1e-11, token * 1e-9, 1e-6, call)
    found = fit(samples(costs))
    for sample in samples(costs, lengths=(1500, 6000)):
        assert found.dense_ms(sample.tokens, SHAPE) == pytest.approx(sample.dense, rel=1e-4)
        assert found.sparse_ms(sample.tokens, SHAPE, sample.share) == pytest.approx(sample.ours, rel=1e-3)


def test_no_coefficient_is_negative_whatever_the_noise():
    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        shaken = [
            Sample(s.tokens, s.shape, s.share, *(x * (0.7 + 0.6 * torch.rand((), generator=noise).item()) for x in t))
            for s in samples(TRUE)
            for t in [(s.ours, s.dense)]
        ]
        found = fit(shaken)
        assert min(found.dense, found.dense_call, found.sparse, found.token, found.block, found.call) >= 0
    with pytest.raises(ValueError, match="three samples"):
        fit(samples(TRUE)[:2])


def test_from_the_break_even_on_it_pays_and_just_below_it_does_not():
    config = COUNTED
    least = TRUE.break_even(SHAPE, config, GPU)
    assert STEP < least < LAST
    for tokens in (least, 2 * least, LAST):
        assert TRUE.sparse_ms(tokens, SHAPE, EXPECTED_SHARE) <= TRUE.dense_ms(tokens, SHAPE)
    below = least - STEP
    assert TRUE.sparse_ms(below, SHAPE, EXPECTED_SHARE) > TRUE.dense_ms(below, SHAPE)
    slow = Costs(dense=1e-11, dense_call=0, sparse=3e-11, token=0, block=0, call=0)
    assert slow.break_even(SHAPE, config, GPU) == LAST, "a kernel three times as slow never pays at half of the pairs"
    known = Costs(dense=1e-11, dense_call=0, sparse=1e-12, token=0, block=0, call=0, shortest=2000)
    assert known.break_even(SHAPE, config, GPU) >= 2000, "nothing is claimed below what was measured"


def test_what_an_estimator_takes_is_what_was_measured():
    dense = {tokens: min(found["dense_ms"].values()) for tokens, found in measured("token").items()}
    beyond = {}
    times = {(row["scoring"], row["tokens"]): row["selection_ms"] for row in measured("scorers", "rows")}
    for (scoring, tokens), time in times.items():
        share = (time - times["mean_pool", tokens]) / dense[tokens]
        beyond[scoring] = max(beyond.get(scoring, 0.0), share)
    for scoring in COUNTING:  # the file tells of earlier ones too
        share = choice_share(OmniSparseConfig(scoring=scoring), GPU)
        assert share == pytest.approx(beyond[scoring], rel=0.1), scoring


def test_what_tokens_take_is_no_less_than_was_measured():
    for tokens, found in measured("token").items():
        dense, packaged = min(found["dense_ms"].values()), costs_of(GPU)
        for case in found["cases"].values():
            active, keys = case["active"], case["keys"]
            config = OmniSparseConfig(granularity="token", lazy_threshold=0.05)
            fixed, scores = TOKENS_ON_A_GPU
            told, took = fixed + scores * active, case["select"] / dense
            assert told > 0.95 * took and (tokens > 1 << 16 or told < 1.1 * took)
            pairs = 2 * active * keys * packaged.sparse / packaged.dense * pair_cost(config)
            # Where it is more than the call itself.
            assert pairs > 0.9 * case["far"] / dense or case["far"] < 0.15 * dense
    assert choice_share(OmniSparseConfig(granularity="token"), GPU) == pytest.approx(sum(TOKENS_ON_A_GPU))
    assert choice_share(config, GPU) == pytest.approx(fixed + scores / 2)


def test_tensor_code_is_never_let_run_unasked():
    """What it takes beyond dense, at its best, so that no length pays."""
    best = min(row["ms"] / row["dense_ms"] - 1 for row in measured("token_cpu", "rows"))
    assert 1 < TENSOR_CODE <= best
    tokens = OmniSparseConfig(granularity="token", max_kv_budget=512)
    assert choice_share(tokens, "cpu") == TENSOR_CODE
    assert costs_of("cpu").break_even(Shape(), tokens, "cpu") == LAST


def measured(name, field=None):
    """Kept results, by number of tokens where no field is asked for."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    return content[field] if field else {int(key): value for key, value in content.items() if key.isdigit()}


def test_rules_that_choose_dearly_pay_later_or_never():
    costs = costs_of(GPU)
    least = {name: costs.break_even(Shape(), OmniSparseConfig(scoring=name), GPU) for name in COUNTING}
    assert least["mean_pool"] < least["tile_pool"] < LAST
    tokens = {"granularity": "token", "max_kv_budget": 4096}
    all_active, some = (
        costs.break_even(Shape(), OmniSparseConfig(lazy_threshold=x, **tokens), GPU) for x in ("auto", 0.05)
    )
    assert least["mean_pool"] < some < all_active < LAST
    told = (RESULTS.parents[1] / "docs" / "limits.md").read_text()
    assert f"{all_active // 1024}K queries on, from {some // 1024}K with `lazy_threshold=0.05`" in " ".join(
        told.split()
    )
    backend = Backend(OmniSparseConfig(granularity="token"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
        assert backend.min_queries(torch.device("cuda")) is None
    assert any(note.startswith(f"{GPU}: dense: these rules pay at no length") for note in backend.log.notes)


@given(st.integers(1, 6), st.integers(0, 400), st.integers(1, 300))
def test_a_fixed_budget_keeps_no_more_than_expected(blocks, budget, window):
    """Against the selection itself."""
    tokens = 128 * blocks + 50
    config = OmniSparseConfig(budget=budget, lazy_threshold=None, sink_size=64, window_size=window)
    query = torch.randn(1, 1, tokens, 8)
    chosen = select_blocks(query, query, IndexMask(causal()), config, target=0.5, scale=0.3)
    kept = chosen.keep.sum() / chosen.layout.some.expand_as(chosen.keep).sum()
    assert kept <= expected_share(tokens, config) + 1e-6


def test_a_bound_expects_no_more_than_no_bound():
    for tokens in (1024, 8192, 1 << 17):
        bounded = expected_share(tokens, OmniSparseConfig(max_kv_budget=1024))
        assert bounded <= expected_share(tokens, COUNTED) == EXPECTED_SHARE
    assert expected_share(1 << 17, OmniSparseConfig(max_kv_budget=1024)) < 0.03


def test_the_users_own_costs_come_first(tmp_path, monkeypatch):
    path = tmp_path / "own" / "costs.json"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    packaged = costs_of("cpu")
    assert packaged is not None and costs_of("a GPU nobody has") is None
    write("cpu", TRUE, path)
    write("a GPU nobody has", TRUE, path)
    assert costs_of("cpu") == TRUE == costs_of("a GPU nobody has")
    backend = Backend(OmniSparseConfig())
    queries = backend.min_queries(torch.device("cpu"), SHAPE)
    assert queries == TRUE.break_even(SHAPE, backend.config, "cpu")
    told = f"cpu: sparse from {queries} queries on, if at most {PEAK_SHARE:.0%} of the pairs are kept"
    assert told in backend.log.notes
    path.write_text("{broken")
    with pytest.raises(ConfigError, match="delete it to start over"):
        costs_of("cpu")


def test_costs_are_looked_for_where_nobody_may_look(tmp_path, monkeypatch):
    """A user without a home, or with somebody else's: the packaged costs, and no error while a model compiles."""
    packaged = costs_of("cpu")
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "home", refuse)
    monkeypatch.setattr(Path, "exists", refuse)
    assert user_file().name == "costs.json" and costs_of("cpu") == packaged


def test_the_packaged_costs_are_those_of_measured_devices():
    known = json.loads(PACKAGED.read_text())
    assert set(known) == {"cpu", "NVIDIA H200"}
    for name in known:
        least = costs_of(name).break_even(Shape(), OmniSparseConfig(), name)
        assert costs_of(name).shortest <= least < 1 << 15


def test_the_peak_rule_has_a_break_even():
    peak = OmniSparseConfig()
    costs = costs_of(GPU)
    assert costs.shortest <= costs.break_even(Shape(), peak, GPU) < 1 << 15
    # Its exact rows cost time, which counts where it keeps as much as block means do.
    assert choice_share(peak, GPU) > choice_share(COUNTED, GPU)
    assert expected_share(1 << 17, peak) < expected_share(1 << 17, COUNTED)

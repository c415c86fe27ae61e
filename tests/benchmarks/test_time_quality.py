"""Time against quality: the time model, the reader, the comparison of budget rules, the plan behind the block rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.costs import selection_cost
from benchmarks.quality.plans import PLANS, block, token
from benchmarks.quality.rules import Rule
from benchmarks.speed_quality import time_quality
from benchmarks.speed_quality.iso_time import Point, compare, missing, verdicts
from benchmarks.speed_quality.time_model import RESULTS, TimeModel, interpolate, label

TOKENS = 32768


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Measurements: blocks take 10 ms per share and 1 ms to choose; tokens 2 + 20 per share of both."""
    rows = [
        {"tokens": n, "kernel": "flash", "kept": x, "attention_ms": 10 * x, "selection_ms": 1.0}
        for n in time_quality.LENGTHS
        for x in (0.1, 0.2)
    ]
    rows.append({"tokens": TOKENS, "kernel": "triton", "kept": 0.1, "attention_ms": 99.0, "selection_ms": 9.0})
    dense = {str(n): {"fa4": 10.0, "cudnn": 12.0} for n in time_quality.LENGTHS}
    full = {str(time_quality.LENGTHS[1]): {"flash": 11.0}}
    (tmp_path / "prefill.json").write_text(json.dumps({"rows": rows, "dense_ms": dense, "full_kernel_ms": full}))
    cases = {
        f"a{a}.k{k}": {"active": a, "keys": k, "near": 2.0, "far": 20 * a * k, "select": 1 + 2 * a}
        for a, k in itertools.product((0.1, 0.3, 0.5), (0.02, 0.05, 0.1))
    }
    content = {str(n): {"cases": cases, "dense_ms": {"cudnn": 11.0}} for n in time_quality.LENGTHS}
    (tmp_path / "token.json").write_text(json.dumps(content))
    return tmp_path


# --- the time model ----------------------------------------------------------


def test_interpolation_hits_measured_points_and_is_monotone():
    points = [(0.3, 7.0), (0.1, 2.0), (0.2, 3.0)]
    for share, ms in points:
        assert interpolate(points, share) == (ms, None)
    line = [interpolate(points, x / 100)[0] for x in range(5, 40)]
    assert line == sorted(line)
    assert interpolate(points, 0.25)[0] == pytest.approx(5.0)


def test_beyond_the_measured_the_nearest_stands_and_says_so():
    points = [(0.1, 2.0), (0.3, 7.0)]
    for share, taken, ms in ((0.05, 0.1, 2.0), (0.4, 0.3, 7.0)):
        found, clipped = interpolate(points, share)
        assert found == ms and clipped is not None
        assert (clipped.value, clipped.taken, clipped.above) == (share, taken, share > taken)
    assert interpolate(points[:1], 0.1) == (2.0, None)


def test_the_recorded_measurements_come_back():
    model = TimeModel()
    for row in model.prefill["rows"]:
        if row["tokens"] in time_quality.LENGTHS and row["kernel"] == "flash":
            time = model.blocks(row["tokens"], row["kept"], "mean_pool")
            assert (time.attention_ms, time.selection_ms) == (row["attention_ms"], row["selection_ms"])
            assert not time.clipped
    for tokens in time_quality.LENGTHS:
        for case in model.token[str(tokens)]["cases"].values():
            time = model.tokens(tokens, case["active"], case["keys"], "one_pass")
            assert time.attention_ms == pytest.approx(case["near"] + case["far"], rel=1e-12) and not time.clipped
            # The choice knows no keys: the mean of its cases, which lie close together.
            assert time.selection_ms == pytest.approx(case["select"], rel=0.06)


def test_more_of_anything_takes_longer():
    model = TimeModel()
    shares = [x / 50 for x in range(1, 51)]
    for tokens in time_quality.LENGTHS:
        lines = [
            [model.blocks(tokens, x, "mean_pool").attention_ms for x in shares],
            [model.tokens(tokens, x, 0.05, "one_pass").attention_ms for x in shares],
            [model.tokens(tokens, 0.3, x / 5, "one_pass").attention_ms for x in shares],
        ]
        assert all(line == sorted(line) for line in lines)


def test_a_kernel_that_keeps_everything_is_a_measured_share(folder: Path):
    model = TimeModel(folder)
    assert model.blocks(TOKENS, 0.6, "exact").clipped["kept"].taken == 0.2
    whole = model.blocks(time_quality.LENGTHS[1], 0.6, "exact")
    assert not whole.clipped and whole.attention_ms == pytest.approx(6.5)  # half way from 2 at 0.2 to 11 at 1


def test_tokens_are_clipped_by_share(folder: Path):
    time = TimeModel(folder).tokens(TOKENS, 0.7, 0.01, "one_pass")
    assert {name: share.above for name, share in time.clipped.items()} == {"active": True, "keys": False}
    assert time.attention_ms == pytest.approx(2 + 20 * 0.5 * 0.02) and time.selection_ms == pytest.approx(2.0)
    time = TimeModel(folder).tokens(TOKENS, 0.2, 0.075, "exact")
    assert not time.clipped and time.selection_ms is None
    assert time.attention_ms == pytest.approx(2 + 20 * 0.2 * 0.075)


def test_other_scorers_come_from_their_file(folder: Path):
    assert TimeModel(folder).blocks(TOKENS, 0.1, "antidiagonal").selection_ms is None
    row = {"scoring": "antidiagonal", "tokens": TOKENS, "attention_ms": 5.0, "selection_ms": 3.0}
    (folder / "scorers.json").write_text(json.dumps({"rows": [row]}))
    time = TimeModel(folder).blocks(TOKENS, 0.1, "antidiagonal")
    assert (time.attention_ms, time.selection_ms) == (1.0, 3.0)
    assert TimeModel(folder).blocks(time_quality.LENGTHS[1], 0.1, "antidiagonal").selection_ms is None


def test_labels_are_the_library_s_at_its_block_size_only():
    pool = {"estimator": "pooled", "options": {"queries": 128, "keys": 128}}
    assert label(block("", size=128, **pool)) == "mean_pool"
    assert label(block("", size=64, **pool)) == label(token("", **pool)) == "pooled128x128"
    strides = [block("", size=128, estimator="antidiagonal", options={"stride": s}) for s in (16, 8)]
    assert [label(rule) for rule in strides] == ["antidiagonal", "antidiagonal8"]
    options = ({}, {"dims": 0}, {"dims": 32}, {"bits8": False})
    names = [label(token("", estimator="one_pass", options=x)) for x in options]
    assert names == ["one_pass", "one_pass", "one_pass dims32", "one_pass 16 bits"]
    assert label(token("", refine=0.2)) == "exact > exact0.2"


# --- the reader and the join -------------------------------------------------


def result(nll: float, attention: float, budget: dict[str, float], active: float = 1.0) -> dict[str, Any]:
    return {"nll": {"a": nll, "b": nll}, "attention": attention, "budget": budget, "active": active}


def row(rule: Rule, own: dict[str, Any]) -> dict[str, Any]:
    return {"rule": dataclasses.asdict(rule), time_quality.TASK: own}


@pytest.fixture
def quality(tmp_path: Path) -> Path:
    pool = {"estimator": "pooled", "options": {"queries": 128, "keys": 128}, "budget": "per_head", "dense_layers": (0,)}
    rules = {
        "dense": (Rule("dense", estimator="dense"), result(2.0, 1.0, {})),
        "block": (block("", size=128, **pool), result(2.01, 0.2875, {"1": 1.0, "2": 1.0, "3": 1.0})),
        "token": (token("", estimator="one_pass", dense_layers=()), result(2.0, 0.1, {"0": 819.2, "1": 409.6}, 0.6)),
        "untimed": (token("", dense_layers=()), result(2.0, 0.1, {"0": 409.6}, 0.3)),
        "block ~ window": (Rule("block ~ window"), result(3.0, 0.1, {})),
    }
    rows = {name: row(dataclasses.replace(rule, name=name), own) for name, (rule, own) in rules.items()}
    rows["items only"] = {"rule": rows["token"]["rule"], "items:4096": {}}
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_the_reader_takes_shares_of_sparse_layers(quality: Path):
    entries = {entry.rule.name: entry for entry in time_quality.read([quality, quality])}
    assert list(entries) == ["block", "token", "untimed"]
    found = entries["block"]
    assert found.change == pytest.approx(100 * math.expm1(0.01)) and found.lost is None
    assert (found.dense, found.kept) == (0.25, pytest.approx(0.05)) and found.source == "quality.json"
    assert (entries["token"].keys, entries["token"].active) == (pytest.approx(0.075), 0.6)


def test_times_hold_selection_and_dense_layers(folder: Path, quality: Path):
    content = time_quality.joined(time_quality.read([quality]), TimeModel(folder))
    assert [found["name"] for found in content["rows"]] == ["block", "token", "untimed"]
    blocks, tokens, untimed = (found["times"][str(TOKENS)] for found in content["rows"])
    assert blocks["ratio"] == pytest.approx(0.25 + 0.75 * (1.0 + 1.0) / 10) and blocks["bound"] == "≤"
    assert tokens["ratio"] == pytest.approx((2 + 20 * 0.5 * 0.075 + 2.0) / 10) and tokens["bound"] == "≥"
    assert tokens["ratio_own_file"] == pytest.approx(tokens["ratio"] * 10 / 11)
    assert (untimed["ratio"], untimed["bound"]) == (None, "")
    assert content["front"][str(TOKENS)] == ["block", "token"]
    assert json.loads(json.dumps(content, allow_nan=False)) is not None


def test_a_bound_beats_no_known_time():
    def timed(name: str, change: float, ratio: float, bound: str = "", at_least: bool = False) -> dict[str, Any]:
        return {"name": name, "change": change, "times": {"1": {"ratio": ratio, "bound": bound, "at_least": at_least}}}

    rows = [timed("bound", 0.0, 0.1, "≥"), timed("known", 1.0, 0.2), timed("worse", 2.0, 0.3)]
    rows += [timed("like", 0.5, 0.4, "≥"), timed("nowhere", -1.0, 0.05, "≥", at_least=True)]
    assert time_quality.front(rows, 1) == ["bound", "known"]


# --- budget rules at equal time ----------------------------------------------


def at(time: float, change: float, *, at_least: bool = False) -> Point:
    return Point(time, None, change, at_least)


def test_equal_time_is_read_off_the_other_rule_s_line():
    verdict = compare(("flat", [at(0.2, 4.0), at(0.4, 2.0)]), ("own", [at(0.3, 1.0)]))
    assert (verdict.winner, verdict.gap, verdict.how) == ("own", pytest.approx(2.0), "interpolated")
    verdict = compare(("flat", [at(0.3, 1.0)]), ("own", [at(0.2, 4.0), at(0.4, 2.0)]))
    assert (verdict.winner, verdict.gap) == ("flat", pytest.approx(2.0))


def test_lines_that_cross_have_no_winner():
    verdict = compare(("flat", [at(0.2, 4.0), at(0.4, 2.0)]), ("own", [at(0.2, 3.0), at(0.4, 2.5)]))
    assert verdict.winner is None and verdict.how == "interpolated"


def test_faster_and_better_needs_no_equal_time():
    verdict = compare(("flat", [at(0.4, 2.0, at_least=True)]), ("own", [at(0.3, 1.5)]))
    assert (verdict.winner, verdict.gap, verdict.how) == ("own", pytest.approx(0.5), "faster and better")
    assert "at least" in verdict.text
    assert compare(("flat", [at(0.4, 1.0)]), ("own", [at(0.3, 1.5)])).winner is None
    assert compare(*[(name, [at(0.4, 1.0, at_least=True)]) for name in ("flat", "own")]).winner is None


def test_only_rows_alike_are_compared_and_good_ones_together_last():
    def rule(estimator: str, budget: str | int, **changes: Any) -> Rule:
        return token(f"{estimator} {budget}", estimator=estimator, budget=budget, **changes)

    rows = [
        (rule("exact", "flattest_head"), at(0.4, 1.0)),
        (rule("one_pass", "flattest_head", target=0.9), at(0.2, 3.0)),
        (rule("exact", "per_head"), at(0.3, 1.5)),
        (rule("exact", 512, gqa="mean"), at(0.3, 0.0)),
        (rule("fp8", "per_head"), at(0.3, 0.0)),
    ]
    found = verdicts(rows)
    assert [x["estimators"] for x in found] == [["exact"], ["exact", "one_pass"]]
    assert [x["winner"] for x in found] == [None, "per_head"] and found[1]["gap"] == pytest.approx(0.5)
    assert not found[0]["selection_included"]
    assert "token, good scorer" not in " ".join(missing(r for r, _ in rows))


# --- the block rows ----------------------------------------------------------


def test_the_plan_makes_the_block_rows():
    rows = json.loads((RESULTS / "quality_smollm2_blocks.json").read_text())["rows"]
    plan = {x.rule.name: x.rule for x in PLANS["blocks"]}
    assert len(plan) == len(PLANS["blocks"]) and list(plan) == list(rows)
    for name, rule in plan.items():
        own = rows[name][time_quality.TASK]
        assert Rule.from_dict(rows[name]["rule"]) == rule
        leads = -(-len(own["budget"]) // rule.share)
        cost = selection_cost(rule, 8192, 64, 3, own["active"]) * leads / 30
        assert own["selection"] == pytest.approx(cost, rel=1e-6), name


def test_table_and_picture_of_the_recorded_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert time_quality.main(["--out", str(tmp_path / "out.json")]) == 0
    content, text = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    assert content == json.loads((RESULTS / "time_quality.json").read_text()), (
        "run python -m benchmarks.speed_quality.time_quality"
    )
    assert text == (RESULTS / "time_quality.md").read_text() and text in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

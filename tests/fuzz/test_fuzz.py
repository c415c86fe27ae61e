"""The first cases of each fuzz, and that a fuzz finds a fault; more: ``make fuzz MINUTES=30``."""

import importlib
import itertools

import pytest
import torch

from omnisparse_flex.masks.blocks import layout
from omnisparse_flex.masks.expr import terms
from tests.fuzz import fuzz_calls, fuzz_modules
from tests.fuzz.fuzz_run import main, shrink

CALLS, MODULES, CHUNK = 64, 24, 16


def assert_right(fuzz, first, count, **how):
    for seed in range(first, first + count):
        case = fuzz.draw(seed)
        problem = fuzz.problem_of(case, **how)
        if problem is not None and not problem.startswith("invalid"):
            small, why = shrink(fuzz, case, problem, how)
            pytest.fail(f"seed {seed}: {problem}\nsimplest: {why}\n{small.script()}")


@pytest.mark.parametrize("first", range(0, CALLS, CHUNK))
def test_calls(first):
    assert_right(fuzz_calls, first, CHUNK)


@pytest.mark.parametrize("first", range(0, MODULES, CHUNK // 2))
def test_modules(first):
    before = fuzz_modules.outcomes["rewritten"]
    assert_right(fuzz_modules, first, CHUNK // 2)
    assert fuzz_modules.outcomes["rewritten"] > before, "what was compared was left alone"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 4, 2))
def test_modules_through_inductor(first):
    assert_right(fuzz_modules, first, 2, inner="inductor")


@pytest.mark.gpu
def test_on_a_gpu():
    assert_right(importlib.import_module("tests.fuzz.fuzz_gpu"), 0, 40)


def found_with(fuzz, count, wanted=lambda case: True):
    """Whether any of the first cases of a kind goes wrong."""
    cases = itertools.islice((x for x in map(fuzz.draw, range(1000)) if wanted(x)), count)
    problems = (fuzz.problem_of(case) for case in cases)
    return any(x is not None and not x.startswith("invalid") for x in problems)


def test_a_lost_row_is_found(monkeypatch):
    """Without what keeps rows from losing every key, the fuzz must say so."""
    monkeypatch.setattr(layout, "_rescue", lambda mask, some, *_: torch.zeros_like(some))
    monkeypatch.setattr(layout, "_window_blocks", lambda grid, *_: torch.zeros(grid.q_blocks, grid.kv_blocks).bool())
    assert found_with(fuzz_calls, 20, lambda case: dict(case.rules).get("sink_size") == 0 and case.terms)


def test_a_block_too_few_is_found(monkeypatch):
    real = terms.block_bounds

    def short(expr, buffers, grid):
        full, some = real(expr, buffers, grid)
        return full, some & (torch.arange(grid.kv_blocks) > 0)

    monkeypatch.setattr(terms, "block_bounds", short)
    assert found_with(fuzz_calls, 20) and found_with(fuzz_modules, 4)


def test_a_failure_is_shrunk_to_a_script_that_runs(monkeypatch):
    def fails(case):
        return "too long" if case.q_len > 3 and case.terms else None

    monkeypatch.setattr(fuzz_calls, "problem_of", fails)
    case = next(x for x in map(fuzz_calls.draw, range(100)) if fails(x) and len(x.terms) > 1)
    small, why = shrink(fuzz_calls, case, "too long", {})
    assert why == "too long" and len(small.terms) == 1 and small.q_len <= 7 and small.batch == small.kv_heads == 1
    names = {}
    exec(small.script(), names)
    assert names["query"].shape[2] == small.q_len


def test_the_command_counts_and_says_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fuzz_calls, "problem_of", lambda case: "wrong" if case.seed == 2 else None)
    monkeypatch.setattr("sys.argv", ["fuzz_run.py", "calls", "--cases", "4", "--out", str(tmp_path / "counts.json")])
    assert main() == 1
    assert '"cases": 4, "invalid": 0, "bad": 1, "bad_seeds": [2]' in capsys.readouterr().out
    assert (tmp_path / "counts.json").exists()

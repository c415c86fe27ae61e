"""The speed benchmarks' own arithmetic, and that the packaged costs are what their results say."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend
from omnisparse_flex.calibration.device_speed import kept_share
from omnisparse_flex.calibration.fit import fit
from omnisparse_flex.calibration.timing import milliseconds
from omnisparse_flex.cost_model import BLOCK, PACKAGED, expected_share

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench():
    """Imports a script of the benchmarks' folder."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_the_packaged_costs_are_fitted_to_the_kept_results(bench):
    fit_costs = bench("prefill.fit_costs")
    known = json.loads(PACKAGED.read_text())
    for name, read in (("prefill.json", fit_costs.gpu_samples), ("prefill_cpu.json", fit_costs.cpu_samples)):
        content = json.loads((BENCHMARKS / "results" / name).read_text())
        device = content["device"] if name == "prefill.json" else "cpu"
        expected = dataclasses.asdict(fit(read(content)))
        assert known[device] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokens", [8192, 131072])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_budget_for_a_share_is_the_largest_that_fits(bench, tokens, share):
    ttft = bench("model.bench_ttft")
    config = ttft.rules(share, tokens, 28, 2)
    assert config.recalls == (1.0,) * 2 + (0.95,) * 26
    assert expected_share(tokens, config) <= share or config.budget == 0
    more = dataclasses.replace(config, budget=config.budget + BLOCK)
    assert expected_share(tokens, more) > share


def test_random_data_keeps_the_share_that_is_asked_for(bench):
    prefill = bench("prefill.bench_prefill")
    query, key, _ = prefill.inputs(4096, "cpu", 1)[0]
    assert kept_share(OmniSparseConfig(target_recall=0.5, budget="per_head"), query, key) == pytest.approx(
        0.5, abs=0.05
    )


def test_transposed_lists_are_timed(bench):
    assert bench("prefill.bench_train").transpose_milliseconds(512, 0.5, "cpu") > 0


def test_time_is_that_of_one_call():
    calls = []
    took = milliseconds(lambda x: calls.append(x), [(1,), (2,)], runs=4, warm_up=1, queued=3)
    queued = 3 if torch.cuda.is_available() else 1
    assert calls == ([1, 2] * 20)[: 1 + 4 * queued], "the inputs take turns"
    assert 0 <= took.low <= took.median <= took.high < 1000


def test_profiled_kernels_are_told_apart(bench):
    timing = bench("common.gpu_timing")
    kernels = {"triton_tem_fused_flex_attention_3": 2.0, "kernel_cutlass_flash_fwd": 3.0, "triton_red_fused_add": 0.5}
    assert timing.attention_share(kernels) == 5.0


def test_the_quick_decoder_runs(bench, capsys):
    """Dense and sparse through the same compiler; an eager inner, so that nobody waits."""
    ttft = bench("model.bench_ttft")
    options = argparse.Namespace(
        device="cpu", hidden="small", layers=2, dense_layers=1, shares=[0.5], hf=False, stats=False
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "inner_for", lambda *_: "eager")
        row = ttft.Bench(options).length(512)
    assert row["dense"]["rewritten"] == 0 and row["d0.5"]["rewritten"] == 1
    assert row["d0.5"]["whole_model"] == pytest.approx(0.5 + 0.5 * row["d0.5"]["share"])
    assert "512: d0.5" in capsys.readouterr().out


def test_the_runner_goes_on_after_a_failure(bench, tmp_path, monkeypatch, capfd):
    runner = bench("common.run_gpu")
    assert all((BENCHMARKS / script.file).is_file() for script in runner.SCRIPTS)
    ttft = next(script for script in runner.SCRIPTS if script.name == "ttft")
    assert runner.command(ttft, quick=False, device="cuda")[2:] == ["--hf", "--device", "cuda"]
    assert runner.command(ttft, quick=True, device="cpu")[2:] == ["--quick", "--device", "cpu"]
    data = next(script for script in runner.SCRIPTS if script.name == "library")
    assert runner.command(data, quick=False, device="cuda", data=Path("x"))[2:] == ["--data", "x"]
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "good.py").write_text("import omnisparse_flex.config; print('ran')")
    scripts = [runner.Script(name, f"{name}.py", limit) for name, limit in (("bad", 30), ("slow", 0.5), ("good", 60))]
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "SCRIPTS", scripts)
    monkeypatch.setattr("sys.argv", ["run_gpu.py"])
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    assert runner.main() == 1
    said = capfd.readouterr().out
    assert "bad: failed with exit status 3" in said and "slow: stopped after 0 s" in said and "good: ok" in said


def test_each_gpu_runs_scripts_of_its_own_on_its_own_cores(bench, monkeypatch, tmp_path, capfd):
    runner = bench("common.run_gpu")
    told = "import os; print('ran', os.environ['CUDA_VISIBLE_DEVICES'], *os.sched_getaffinity(0)); "
    # Each ends once the other has begun.
    wait = "import pathlib, time; here = pathlib.Path({!r}); (here / {!r}).touch()\nwhile not (here / {!r}).exists(): "
    for own, other in ("ab", "ba"):
        source = told + wait.format(str(tmp_path), own, other) + "time.sleep(0.01)"
        (tmp_path / f"{own}.py").write_text(source)
    scripts = [runner.Script(name, f"{name}.py", 60, device=False) for name in "ab"]
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "SCRIPTS", scripts)
    monkeypatch.setattr("sys.argv", ["run_gpu.py", "--gpus", "2"])
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(cores))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert runner.main() == 0
    assert {line for line in capfd.readouterr().out.splitlines() if line.startswith("ran")} == {
        f"ran {gpu} {core}" for gpu, core in zip((5, 6), cores, strict=True)
    }


def test_short_lengths_name_what_ran(bench, monkeypatch):
    short = bench("prefill.bench_short")
    monkeypatch.setattr(Backend, "inner_for", lambda *_: "eager")
    monkeypatch.setattr(short, "graphs_over_lengths", lambda model, device, longest: (longest, 3))
    seen = []
    options = argparse.Namespace(quick=True, device="cpu", hidden="small", layers=2, seconds=60.0)
    result = short.measure(options, lambda so_far: seen.append(set(so_far["slowdown_pct"])))
    names = [{f"{what} 1 x {tokens}" for what in ("prefill", "decode")} for tokens in (256, 512)]
    assert seen == [names[0], names[0] | names[1], names[0] | names[1]]
    assert result["graphs_over_20_lengths"] == 2048 and result["choice_graphs_over_20_lengths"] == 3


def test_the_picture_shows_what_was_measured(bench, tmp_path):
    pytest.importorskip("matplotlib")
    plot = bench("prefill.plot_speed")
    content = json.loads((BENCHMARKS / "results" / "prefill.json").read_text())
    rows = {(r["kernel"], r["tokens"]): r for r in content["rows"] if r["asked"] == plot.SHARE}
    found = {(kernel, point[0]): point for kernel, points in plot.series(content).items() for point in points}
    assert found.keys() == rows.keys()
    for name, (_, call, on_device) in found.items():
        assert call == pytest.approx(rows[name]["speedup"]) and on_device > 0.95 * call
    plot.draw(content, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_figures_are_of_tested_kernels_only(bench):
    """A figure takes the fastest of the kernels that were shown to be right, as the library runs them."""
    figures = bench("prefill.prefill_figures")
    content = json.loads((BENCHMARKS / "results" / "prefill.json").read_text())
    found, by_dynamic = figures.figures(content), {}
    for dynamic in (False, True):
        rows = [{**row, "dynamic": dynamic} for row in content["rows"]]
        by_dynamic[dynamic] = figures.figures({**content, "rows": rows})
    for name in ("prefill.speedup.32k.d10", "prefill.speedup.128k.d10", "prefill.speedup.256k.d10"):
        fast, slow = by_dynamic[False][name], by_dynamic[True][name]
        assert "flash kernel" in fast[2] and "triton kernel" in slow[2] and fast[0] > slow[0]
        assert figures.figures(content, ("triton",))[name] == slow
    recorded = json.loads((BENCHMARKS / "results" / "summary.json").read_text())
    assert all(recorded[name]["value"] == value for name, (value, _, _) in found.items())


def test_the_training_figure_is_against_the_fastest_dense_and_names_the_others(bench, tmp_path, monkeypatch):
    train, recorded = bench("prefill.bench_train"), {}
    monkeypatch.setattr(train, "RESULTS", tmp_path / "train.json")
    record = lambda name, value, **about: recorded.update({name: (value, about)})  # noqa: E731
    monkeypatch.setattr(bench("common.summary"), "record", record)
    dense = {"cudnn": 60.0, "fa4": 40.0}
    rows = [
        {"tokens": 32 * train.K, "kernel": kernel, "kept": 0.1, "median": ms, "transposed_ms": 0.1, "dense_ms": dense}
        | train.speedups(dense, ms)
        for kernel, ms in (("flash", 8.0), ("triton", 10.0))
    ]
    train.keep(rows)
    value, about = recorded["train.speedup.32k.d10"]
    assert value == 5.0 and about["baseline"].startswith("fa4") and "flash kernel" in about["baseline"]
    assert "7.50x cudnn" in about["baseline"]
    assert json.loads((tmp_path / "train.json").read_text())["rows"][0]["speedup_by_dense"]["cudnn"] == 7.5
    assert recorded["train.transpose_share.32k"][0] == 0.0125

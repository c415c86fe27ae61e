"""Prefill attention on the CPU: ours, selection included, against dense SDPA.

python -m benchmarks.prefill.bench_prefill_cpu [--quick | --scorers]    table, JSON and figures
pytest benchmarks/prefill/bench_prefill_cpu.py --benchmark-group-by=group
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import summary
from benchmarks.prefill import prefill_cases as cases

RESULTS = Path(__file__).resolve().parents[1] / "results" / "prefill_cpu.json"
LENGTHS = (2048, 4096, 8192, 16384)
DENSITIES = (0.05, 0.15, 0.30, 0.50)
#: Where break-even is looked for besides; below 768, blocks of 128 keep more than 30 %.
SHORT_LENGTHS = (768, 1024, 1536, 3072)
BREAK_EVEN_DENSITIES = (0.15, 0.30)
ROUNDS = 7
#: Short calls are repeated until a round takes this long.
ROUND_S = 0.02


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function, taken in turn: a busy machine then slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    repeats = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        repeats[name] = max(1, int(ROUND_S / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return times


@torch.no_grad()
def measure(tokens: int, densities: tuple[float, ...], rounds: int) -> list[dict[str, Any]]:
    """Rows of one length: dense, total and selection time of every density within reach."""
    query, key, value = cases.inputs(tokens)
    functions = {"dense": cases.dense(query, key, value)}
    found = {}
    for asked in densities:
        case = cases.find_case(tokens, asked, query, key)
        if case is None:
            print(f"{tokens:6d} tokens: {asked:.0%} is out of reach, 128-wide blocks keep more", flush=True)
            continue
        found[asked] = case
        functions[f"total {asked}"] = cases.sparse(case.config, query, key, value)
        functions[f"selection {asked}"] = cases.selection(case.config, query, key)
    times = interleaved(functions, rounds)
    rows = [row(case, times) for case in found.values()]
    show(f"{tokens} tokens", rows)
    return rows


def row(case: cases.Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """One case's medians, and the median of the rounds' ratios."""
    dense, total, select = (times[name] for name in ("dense", f"total {case.asked}", f"selection {case.asked}"))
    return {
        "tokens": case.tokens,
        "density_asked": case.asked,
        "density": round(case.density, 4),
        "dense_ms": round(statistics.median(dense), 3),
        "total_ms": round(statistics.median(total), 3),
        "selection_ms": round(statistics.median(select), 3),
        "speedup": round(statistics.median(d / t for d, t in zip(dense, total, strict=True)), 3),
        "select_share": round(statistics.median(s / d for s, d in zip(select, dense, strict=True)), 5),
        "rounds_ms": {"dense": dense, "total": total, "selection": select},
        "config": case.config.to_dict(),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    print(f"\n{title}\n tokens  density  dense ms  total ms  selection ms  speed-up  selection/dense")
    for r in rows:
        print(
            f"{r['tokens']:7d}  {r['density']:7.1%}  {r['dense_ms']:8.2f}  {r['total_ms']:8.2f}  "
            f"{r['selection_ms']:12.2f}  {r['speedup']:7.2f}x  {r['select_share']:15.2%}",
            flush=True,
        )


@torch.no_grad()
def measure_scorers(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Time of each scorer alone against dense attention, at one length."""
    query, key, value = cases.inputs(tokens)
    functions = {"dense": cases.dense(query, key, value)}
    functions |= {name: cases.scoring(name, query, key) for name in cases.SCORERS}
    times = interleaved(functions, rounds)
    rows = []
    print(f"\nscoring alone, {tokens} tokens\n  dense ms  scoring ms  scoring/dense", flush=True)
    for name in cases.SCORERS:
        share = statistics.median(s / d for s, d in zip(times[name], times["dense"], strict=True))
        dense, alone = (statistics.median(times[x]) for x in ("dense", name))
        rows.append({"tokens": tokens, "scoring": name, "dense_ms": dense, "scoring_ms": alone, "share": share})
        print(f"{dense:10.2f}  {alone:10.2f}  {share:13.2%}  {name}", flush=True)
    return rows


def first_win(rows: list[dict[str, Any]], asked: float) -> int | None:
    """The least length from which on every longer one wins, at one density."""
    wins = None
    for r in sorted((r for r in rows if r["density_asked"] == asked), key=lambda r: -r["tokens"]):
        if r["speedup"] <= 1:
            break
        wins = r["tokens"]
    return wins


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": summary.device_name() if not torch.cuda.is_available() else summary.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "load": [round(x, 2) for x in os.getloadavg()],
        "commit": summary.commit(),
    }


def keep(
    rows: list[dict[str, Any]], short: list[dict[str, Any]], scorers: list[dict[str, Any]], before: dict[str, Any]
) -> None:
    """Write the JSON and the two figures."""
    wins = {f"d{round(d * 100)}": first_win([*rows, *short], d) for d in BREAK_EVEN_DENSITIES}
    content = {"environment": before, "load_after": os.getloadavg(), "rows": rows, "short": short, "break_even": wins}
    content["scorers"] = scorers
    summary.write_json(content, RESULTS)
    (figure,) = (r for r in rows if (r["tokens"], r["density_asked"]) == (8192, 0.15))
    device = f"{before['device']}, {before['threads']} threads"
    shape = f"{cases.HEADS}/{cases.KV_HEADS} heads, D={cases.HEAD_DIM}, fp32, density {figure['density']:.3f}"
    for name, field, unit in (("speedup.8k.d15", "speedup", "x"), ("select_share.8k", "select_share", "of dense")):
        baseline = f"dense CPU SDPA; {shape}"
        summary.record(
            f"prefill_cpu.{name}", figure[field], unit=unit, baseline=baseline, script=__file__, device=device
        )


def main() -> int:
    """Measure everything, print tables, keep JSON and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8K only, three rounds, nothing kept")
    parser.add_argument("--scorers", action="store_true", help="the scorers alone at 8K, nothing kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = environment()
    print(", ".join(f"{key} {value}" for key, value in before.items()), flush=True)
    if before["load"][0] > 0.5:
        print("this machine is busy: the numbers will be worse than they should be", flush=True)
    if options.scorers:
        measure_scorers(8192, ROUNDS)
        return 0
    if options.quick:
        measure(8192, (0.15,), 3)
        return 0
    rows = [r for tokens in LENGTHS for r in measure(tokens, DENSITIES, ROUNDS)]
    show("prefill", rows)
    short = [r for tokens in SHORT_LENGTHS for r in measure(tokens, BREAK_EVEN_DENSITIES, ROUNDS)]
    wanted = [r for r in (*short, *rows) if r["density_asked"] in BREAK_EVEN_DENSITIES]
    show("break_even", sorted(wanted, key=lambda r: (r["density_asked"], r["tokens"])))
    for asked in BREAK_EVEN_DENSITIES:
        print(f"sparse wins at {asked:.0%} from {first_win([*rows, *short], asked)} tokens on")
    keep(rows, short, measure_scorers(8192, ROUNDS), before)
    return 0


@pytest.fixture(scope="module", params=LENGTHS, ids=lambda n: f"{n // 1024}k")
def tensors(request: pytest.FixtureRequest) -> Iterator[tuple[torch.Tensor, ...]]:
    with torch.no_grad():
        yield cases.inputs(request.param)


def annotate(benchmark: Any, tokens: int, **extra: Any) -> None:
    benchmark.group = f"prefill-{tokens}"
    benchmark.extra_info.update(environment(), **extra)


def test_dense(benchmark: Any, tensors: tuple[torch.Tensor, ...]) -> None:
    annotate(benchmark, tensors[0].shape[2], density=1.0, selection_ms=0.0)
    benchmark.pedantic(cases.dense(*tensors), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("asked", DENSITIES)
def test_sparse(benchmark: Any, tensors: tuple[torch.Tensor, ...], asked: float) -> None:
    case = cases.find_case(tensors[0].shape[2], asked, *tensors[:2])
    if case is None:
        pytest.skip(f"{asked:.0%} is out of reach at this length: 128-wide blocks keep more")
    function = cases.sparse(case.config, *tensors)
    select = interleaved({"selection": cases.selection(case.config, *tensors[:2])}, 5)["selection"]
    annotate(benchmark, case.tokens, density=case.density, selection_ms=statistics.median(select))
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", cases.SCORERS)
def test_scoring(benchmark: Any, tensors: tuple[torch.Tensor, ...], name: str) -> None:
    annotate(benchmark, tensors[0].shape[2], scoring=name)
    benchmark.pedantic(cases.scoring(name, *tensors[:2]), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())

"""Prefill attention on a GPU: ours at several kept block shares against the fastest dense kernel of the same run.

    python3 -m benchmarks.prefill.bench_prefill
    python3 -m benchmarks.prefill.bench_prefill --quick --device cpu

28 query heads, 4 KV heads, D = 128, bfloat16, causal, batch 1, **random data**: with it every block of
a row has the same mass, so that ``target_recall`` = d keeps a share d of the blocks while the whole
selection runs as it does on real data. The share that was kept is measured. Times are whole calls as a
compiled model makes them, selection included, replayed as CUDA graphs, ours and the dense ones alike: in
a model the device never waits for the launches of one layer. ``host_ms`` is what launching one call takes.
The attention kernel's own time is the profiler's.
Efficiency = (dense time of the same kernel / time of the sparse kernel) x kept share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.gpu_timing import attention_share, captured, dense_attention, kernel_milliseconds
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention.flex_options import has_flash
from omnisparse_flex.calibration.device_speed import compiled_attention, kept_share
from omnisparse_flex.calibration.timing import Function, Timing, milliseconds

RESULTS = Path(__file__).resolve().parents[1] / "results" / "prefill.json"
HEADS, KV_HEADS, DIM = 28, 4, 128
SCALE = DIM**-0.5
K = 1024
#: Lengths in K tokens of each kept share; 10 % is the one that figures are about.
CASES = {0.1: (4, 8, 16, 32, 64, 128, 256), 0.05: (32, 128), 0.25: (32, 64, 128), 0.6: (32,)}
#: From here on one dense run takes over half a second: only the two fastest dense kernels, fewer runs.
LONG = 192 * K


def inputs(tokens: int, device: str, sets: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of query, key and value."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes) for _ in range(sets)]  # type: ignore[misc]


def sparse(share: float, kernel: str) -> Callable[..., Tensor]:
    """Our attention at a kept share; FLASH takes graphs of one length only."""
    rules = OmniSparseConfig(target_recall=share, budget="per_head")
    return compiled_attention(rules, kernel=kernel, dynamic=kernel != "flash")


def timed(function: Function, sets: list[tuple[Tensor, Tensor, Tensor]]) -> Timing:
    """Device time of one call; long ones vary little and run seldom."""
    if not torch.cuda.is_available():
        return milliseconds(function, sets, runs=3)
    long = sets[0][0].shape[2] >= LONG
    return milliseconds(captured(function, sets), [()], runs=2 if long else 5, queued=1 if long else 4)


def host_milliseconds(function: Function, one: tuple[Tensor, ...]) -> float:
    """What the host does to launch one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(*one)
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * took


class Bench:
    """One run: times by length, share and kernel.

    Attributes:
        rows: What was measured.
        dense_ms: Of each dense kernel, by length.
        full_ms: Of each sparse kernel keeping everything, by length.
    """

    def __init__(self, device: str, kernels: tuple[str, ...], deadline: float) -> None:
        """Prepare; ``deadline`` in seconds of ``time.perf_counter``: no case starts after it."""
        self.device, self.kernels, self.deadline = device, kernels, deadline
        self.rows: list[dict[str, Any]] = []
        self.dense_ms: dict[int, dict[str, float]] = {}
        self.full_ms: dict[int, dict[str, float]] = {}

    def run(self, cases: dict[float, tuple[int, ...]], unit: int = K) -> None:
        """All lengths of all shares."""
        for share, lengths in cases.items():
            for kernel in self.kernels:
                attend = sparse(share, kernel)
                for length in lengths:
                    if time.perf_counter() < self.deadline:
                        self._case(attend, share, kernel, length * unit)
                if unit == K:
                    keep(self)  # a later case may fail, or run out of time

    def dense(self, tokens: int) -> dict[str, float]:
        """Milliseconds of every dense kernel at a length."""
        if tokens not in self.dense_ms:
            sets = inputs(tokens, self.device, 2)
            kernels = dense_attention(SCALE)
            if tokens >= LONG:
                kernels = {name: f for name, f in kernels.items() if name != "flash"}
            self.dense_ms[tokens] = {name: timed(f, sets).median for name, f in kernels.items()}
            print(f"  dense {tokens}: " + ", ".join(f"{n} {ms:.3f}" for n, ms in self.dense_ms[tokens].items()))
        return self.dense_ms[tokens]

    def _case(self, attend: Callable[..., Tensor], share: float, kernel: str, tokens: int) -> None:
        dense, sets = self.dense(tokens), inputs(tokens, self.device, 2)
        took = timed(attend, sets)
        row: dict[str, Any] = {"tokens": tokens, "asked": share, "kernel": kernel, **dataclasses.asdict(took)}
        row["dynamic"] = kernel != "flash"  # as in ``sparse``
        row["kept"] = kept_share(OmniSparseConfig(target_recall=share, budget="per_head"), *sets[0][:2])
        row["speedup"] = min(dense.values()) / took.median
        if self.device == "cuda":
            row["host_ms"] = host_milliseconds(attend, sets[0])
            kernels = kernel_milliseconds(attend, sets[0])
            row["attention_ms"] = attention_share(kernels)
            row["selection_ms"] = sum(kernels.values()) - row["attention_ms"]
            row["selection_share_of_dense"] = row["selection_ms"] / min(dense.values())
            row["kernels"] = dict(sorted(kernels.items(), key=lambda x: -x[1])[:12])
        self.rows.append(row)
        parts = ", ".join(f"{k} {row[k]:.4g}" for k in ("kept", "median", "speedup", "attention_ms") if k in row)
        print(f"  {tokens:7d} d{share} {kernel}: {parts}, selection {row.get('selection_ms', 0):.3f} ms", flush=True)

    def full_kernels(self, lengths: tuple[int, ...]) -> None:
        """Time each sparse kernel when it keeps everything: what efficiency refers to."""
        for kernel in self.kernels:
            attend = sparse(0.9999, kernel)
            for tokens in lengths:
                one = inputs(tokens, self.device, 1)[0]
                self.full_ms.setdefault(tokens, {})[kernel] = attention_share(kernel_milliseconds(attend, one))


def keep(bench: Bench) -> None:
    """Write the JSON and the figures, as far as they were measured."""
    from benchmarks.common import summary
    from benchmarks.prefill import prefill_figures

    for row in bench.rows:
        if row["kernel"] in bench.full_ms.get(row["tokens"], {}):
            row["efficiency"] = bench.full_ms[row["tokens"]][row["kernel"]] / row["attention_ms"] * row["kept"]
    about = {"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit()}
    content = {"rows": bench.rows, "dense_ms": bench.dense_ms, "full_kernel_ms": bench.full_ms, "flash4": has_flash()}
    summary.write_json({**about, **content}, RESULTS)
    prefill_figures.record(json.loads(RESULTS.read_text()))


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", nargs="+", default=None, help="triton, flash; default: what is installed")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after so long")
    parser.add_argument("--quick", action="store_true", help="one short case; records nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    kernels = tuple(options.kernels or (("flash", "triton") if has_flash() else ("triton",)))
    bench = Bench(options.device, kernels, time.perf_counter() + options.seconds)
    with torch.no_grad():
        if options.quick:
            bench.run({0.25: (1024,)}, unit=1)
            return 0
        bench.full_kernels((64 * K, 128 * K))
        bench.run(CASES)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One training step of attention (forward and backward) on a GPU, ours against the fastest dense of the same run.

    python3 -m benchmarks.prefill.bench_train
    python3 -m benchmarks.prefill.bench_train --quick --device cpu

28 query heads, 4 KV heads, D = 128, bfloat16, causal, batch 1, random data, 10 % of the blocks (see
``bench_prefill.py``), sinks included, selection included. ``--no-copies`` leaves the sink blocks of the
backward unrepeated (``sink_copies.py``), to compare; it records nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omnisparse_flex.masks.blocks.block_lists  # noqa: F401  (defines torch.ops.omnisparse.map_lists)
from benchmarks.common.gpu_timing import dense_attention, kernel_milliseconds
from benchmarks.prefill.bench_prefill import KV_HEADS, SCALE, K, inputs, sparse
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention import sink_copies
from omnisparse_flex.attention.flex_options import has_flash
from omnisparse_flex.calibration.device_speed import kept_share
from omnisparse_flex.calibration.timing import milliseconds

RESULTS = Path(__file__).resolve().parents[1] / "results" / "train.json"
#: In K tokens, the one that figures are about first.
LENGTHS = (32, 8, 16, 64)
SHARE = 0.1
RULES = OmniSparseConfig(target_recall=SHARE, budget="per_head")


def step(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """Forward and backward of an attention function."""

    def run(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Any:
        return torch.autograd.grad(attend(query, key, value), (query, key, value), weight)

    return run


def with_weights(sets: list[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Inputs that want gradients, and the gradient of the output."""
    return [(*(x.requires_grad_() for x in one), torch.randn_like(one[0])) for one in sets]


def transpose_milliseconds(tokens: int, share: float, device: str) -> float:
    """What the key-to-query lists cost: those of full and of partial blocks, compiled as in a graph."""
    blocks = tokens // 128
    keep = (torch.rand(KV_HEADS, 1, blocks, blocks, device=device) < share).tril()
    full = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril(-1)

    @torch.compile(dynamic=False)
    def lists(keep: Tensor, full: Tensor) -> list[Tensor]:
        return list(torch.ops.omnisparse.map_lists(keep.transpose(-1, -2), full.transpose(-1, -2)))

    lists(keep, full)
    if device == "cuda":
        return sum(kernel_milliseconds(lists, (keep, full)).values())
    return milliseconds(lists, [(keep, full)], runs=2).median


def speedups(dense: dict[str, float], ours: float) -> dict[str, Any]:
    """How many times faster than the fastest dense kernel we are, and than each."""
    return {
        "speedup": min(dense.values()) / ours,
        "speedup_by_dense": {name: took / ours for name, took in dense.items()},
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all lengths and kernels."""
    rows, deadline = [], time.perf_counter() + options.seconds
    lengths = (0.5,) if options.quick else LENGTHS
    kernels = options.kernels or (["flash", "triton"] if has_flash() else ["triton"])
    ours = {kernel: sparse(SHARE, kernel) for kernel in kernels}  # nothing is compiled before the first call
    for length in lengths:
        tokens = int(length * K)
        sets = with_weights(inputs(tokens, options.device, 2))
        dense = {n: milliseconds(step(f), sets, runs=5).median for n, f in dense_attention(SCALE).items()}
        print(f"  dense {tokens}: " + ", ".join(f"{n} {ms:.3f}" for n, ms in dense.items()), flush=True)
        for kernel, attend in ours.items():
            if options.device == "cpu" or time.perf_counter() > deadline:
                continue  # compiled flex attention has no backward on the CPU
            sets = with_weights(inputs(tokens, options.device, 2))  # new: a graph for all lengths marks its inputs
            took = milliseconds(step(attend), sets, runs=5)
            transposed = transpose_milliseconds(tokens, SHARE, options.device)
            row = {"tokens": tokens, "kernel": kernel, "dense_ms": dense, **dataclasses.asdict(took)}
            row |= {
                "kept": kept_share(RULES, *(x.detach() for x in sets[0][:2])),
                "transposed_ms": transposed,
            }
            row |= speedups(dense, took.median)
            row["kernels"] = dict(sorted(kernel_milliseconds(step(attend), sets[0]).items(), key=lambda x: -x[1])[:12])
            rows.append(row)
            if options.copies:
                keep(rows)  # a later length may fail, or run out of time
            print(
                f"  {tokens:7d} {kernel}: kept {row['kept']:.3f}, {took.median:.3f} ms, "
                f"{', '.join(f'{x:.2f}x {name}' for name, x in row['speedup_by_dense'].items())}, "
                f"transposed lists {transposed:.3f} ms",
                flush=True,
            )
        if options.quick:
            print(f"  transposed lists {transpose_milliseconds(tokens, SHARE, options.device):.3f} ms")
    return rows


def keep(rows: list[dict[str, Any]]) -> None:
    """Write the JSON and the figures."""
    from benchmarks.common import summary

    versions = {"torch": torch.__version__, "device": summary.device_name(), "flash4": has_flash()}
    summary.write_json({**versions, "rows": rows}, RESULTS)
    at32 = [row for row in rows if row["tokens"] == 32 * K]
    if at32:
        best = max(at32, key=lambda row: row["speedup"])
        dense = best["dense_ms"]
        others = ", ".join(f"{x:.2f}x {name}" for name, x in sorted(best["speedup_by_dense"].items()))
        what = f"fwd+bwd, sinks included; random data, {best['kept']:.3f} of the blocks, {best['kernel']} kernel"
        baseline = f"{min(dense, key=lambda n: dense[n])}, fastest dense of the run ({others}), {what}"
        value = round(best["speedup"], 3)
        summary.record("train.speedup.32k.d10", value, unit="x", baseline=baseline, script=__file__)
        share = round(best["transposed_ms"] / best["median"], 5)
        summary.record("train.transpose_share.32k", share, unit="share of our step", baseline=baseline, script=__file__)


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", nargs="+", default=None, help="triton, flash; default: what is installed")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no case after so long")
    parser.add_argument(
        "--no-copies", dest="copies", action="store_false", help="do not repeat the sink blocks; records nothing"
    )
    parser.add_argument("--quick", action="store_true", help="one short case; records nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    if not options.copies:
        sink_copies.MIN_KEYS = sys.maxsize
    measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

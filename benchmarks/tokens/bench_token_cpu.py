"""What token granularity takes on a CPU, where it runs in tensor code: a call against dense SDPA, selection included.

    python3 -m benchmarks.tokens.bench_token_cpu

The cost model's constant for it (``cost_model.TENSOR_CODE``) stands on these times. Random data, a fixed budget.
"""

from __future__ import annotations

import functools
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.common import summary
from benchmarks.prefill import bench_prefill_cpu as blocks
from benchmarks.prefill import prefill_cases as cases
from omnisparse_flex import OmniSparseConfig, sparse_attention

RESULTS = Path(__file__).resolve().parents[1] / "results" / "token_cpu.json"
LENGTHS, BUDGET, ROUNDS = (2048, 4096, 8192, 16384, 32768), 256, 3


@torch.no_grad()
def main() -> int:
    """Measure every length; print and write."""
    rows, about = [], blocks.environment()
    for tokens in LENGTHS:
        tensors = cases.inputs(tokens)
        functions = {"dense": cases.dense(*tensors)}
        for threshold in (None, 0.05):
            rules = OmniSparseConfig(granularity="token", budget=BUDGET, lazy_threshold=threshold)
            functions[str(threshold)] = functools.partial(sparse_attention, *tensors, config=rules, enable_gqa=True)
        times = {name: statistics.median(found) for name, found in blocks.interleaved(functions, ROUNDS).items()}
        dense = times.pop("dense")
        rows += [{"tokens": tokens, "lazy_threshold": n, "ms": t, "dense_ms": dense} for n, t in times.items()]
        print(tokens, *(f"lazy_threshold {n}: {t / dense:.2f} x dense" for n, t in times.items()), sep=", ", flush=True)
    summary.write_json({"environment": about, "budget": BUDGET, "rows": rows}, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

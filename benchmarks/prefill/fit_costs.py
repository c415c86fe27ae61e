"""The packaged coefficients of ``omnisparse_flex/cost_model.py``, fitted from the prefill benchmarks' results.

    python3 -m benchmarks.prefill.fit_costs

GPU rows are the Triton kernel's (FLASH is faster: the break-even then errs on the safe side) and
device times, because a model hides the launches; CPU rows are whole calls.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.prefill import prefill_cases
from benchmarks.prefill.bench_prefill import DIM, HEADS, KV_HEADS
from omnisparse_flex.calibration.fit import Sample, fit
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.cost_model import PACKAGED, Costs, Shape, write

RESULTS = Path(__file__).resolve().parents[1] / "results"


def gpu_samples(content: dict[str, Any]) -> list[Sample]:
    """From ``bench_prefill.py``."""
    shape = Shape(HEADS, KV_HEADS, DIM)
    return [
        Sample(
            row["tokens"],
            shape,
            row["kept"],
            row["attention_ms"] + row["selection_ms"],
            min(content["dense_ms"][str(row["tokens"])].values()),
        )
        for row in content["rows"]
        if row["kernel"] == "triton"
    ]


def cpu_samples(content: dict[str, Any]) -> list[Sample]:
    """From ``bench_prefill_cpu.py``; its shortest lengths were not measured at shares near ``EXPECTED_SHARE``."""
    shape = Shape(prefill_cases.HEADS, prefill_cases.KV_HEADS, prefill_cases.HEAD_DIM)
    return [Sample(row["tokens"], shape, row["density"], row["total_ms"], row["dense_ms"]) for row in content["rows"]]


def show(device: str, costs: Costs, samples: list[Sample]) -> None:
    """Print how far the model is from what was measured, and where it breaks even."""
    errors = [costs.sparse_ms(s.tokens, s.shape, s.share) / s.ours - 1 for s in samples]
    dense = [costs.dense_ms(s.tokens, s.shape) / s.dense - 1 for s in samples]
    for name, found in (("sparse", errors), ("dense", dense)):
        print(f"{device}: {name} model off by {min(found):+.0%} to {max(found):+.0%} of {len(found)} samples")
    least = costs.break_even(samples[0].shape, OmniSparseConfig(), device)
    print(f"{device}: breaks even at {least} tokens by default")


def main() -> int:
    """Fit what there are results of."""
    for name, read in (("prefill.json", gpu_samples), ("prefill_cpu.json", cpu_samples)):
        content = json.loads((RESULTS / name).read_text())
        samples = read(content)
        device = content["device"] if read is gpu_samples else "cpu"
        costs = fit(samples)
        write(device, costs, PACKAGED)
        show(device, costs, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())

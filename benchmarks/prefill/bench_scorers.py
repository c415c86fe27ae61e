"""What each estimator of block mass takes on a GPU: the whole choice of blocks, apart from the attention kernel.

    python3 -m benchmarks.prefill.bench_scorers
    python3 -m benchmarks.prefill.bench_scorers --quick --device cpu

28 query heads, 4 KV heads, D = 128, bfloat16, causal, random data, 10 % of the blocks kept, as in ``bench_prefill.py``.
Times are the profiler's sums over the kernels of one call; the attention kernel's is told apart by its name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.gpu_timing import attention_share, kernel_milliseconds
from benchmarks.prefill.bench_prefill import K, inputs
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.calibration.device_speed import compiled_attention
from omnisparse_flex.calibration.timing import milliseconds
from omnisparse_flex.config import SCORINGS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scorers.json"
SHARE = 0.1
#: In K tokens.
LENGTHS = (32, 128)


def measure(scoring: str, tokens: int, device: str) -> dict[str, Any]:
    """One estimator at one length; on a CPU the whole call only, which tells nothing about kernels."""
    attend = compiled_attention(OmniSparseConfig(target_recall=SHARE, scoring=scoring), kernel="triton", dynamic=False)
    one = inputs(tokens, device, 1)[0]
    row: dict[str, Any] = {"scoring": scoring, "tokens": tokens}
    if device == "cpu":
        return row | {"call_ms": milliseconds(attend, [one], runs=2).median}
    kernels = kernel_milliseconds(attend, one)
    attention = attention_share(kernels)
    largest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:8])
    return row | {"attention_ms": attention, "selection_ms": sum(kernels.values()) - attention, "kernels": largest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scoring", nargs="+", choices=SCORINGS["block"], default=list(SCORINGS["block"]))
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after so long")
    parser.add_argument("--quick", action="store_true", help="one short length; writes nothing")
    options = parser.parse_args(arguments)
    from benchmarks.common import summary

    deadline, rows = time.perf_counter() + options.seconds, []
    about = {"torch": torch.__version__, "device": summary.device_name(), "commit": summary.commit(), "share": SHARE}
    with torch.no_grad():
        for scoring in options.scoring:
            for tokens in (K,) if options.quick else tuple(n * K for n in LENGTHS):
                if time.perf_counter() > deadline:
                    break
                rows.append(measure(scoring, tokens, options.device))
                print({key: value for key, value in rows[-1].items() if key != "kernels"}, flush=True)
                if not options.quick:
                    summary.write_json({**about, "rows": rows}, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The figures of ``bench_prefill.py``'s results, of the kernels whose own tests have passed.

python3 -m benchmarks.prefill.prefill_figures
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import summary

RESULTS = Path(__file__).resolve().parents[1] / "results" / "prefill.json"
K = 1024
#: Kernels whose outputs a GPU test has shown to be right (``tests/attention/test_flash.py``).
TESTED = ("triton", "flash")
SHARE = 0.1


def figures(content: dict[str, Any], kernels: tuple[str, ...] = TESTED) -> dict[str, tuple[float, str, str]]:
    """Name -> (value, unit, baseline), as far as it was measured; the fastest of ``kernels`` at each length."""
    found: dict[str, tuple[float, str, str]] = {}
    rows = [row for row in content["rows"] if row["asked"] == SHARE and row["kernel"] in kernels and _runs(row)]
    for tokens in sorted({row["tokens"] for row in rows}):
        best = max((row for row in rows if row["tokens"] == tokens), key=lambda row: row["speedup"])
        dense, name = content["dense_ms"][str(tokens)], f"{tokens // K}k"
        fastest = min(dense, key=lambda kernel: dense[kernel])
        kept = f"{best['kept']:.3f} of the blocks, {best['kernel']} kernel"
        baseline = f"{fastest}, fastest dense of the run; random data, {kept}"
        if tokens // K in (32, 128, 256):
            found[f"prefill.speedup.{name}.d10"] = (round(best["speedup"], 3), "x", baseline)
        if tokens == 128 * K:
            share = round(best["selection_ms"] / min(dense.values()), 5)
            found["select.share.128k"] = (share, "share of the fastest dense", baseline)
        if "efficiency" in best:
            what = f"the {best['kernel']} kernel keeping all; x kept share"
            found[f"prefill.efficiency.{name}.d10"] = (round(best["efficiency"], 4), "share", what)
    return found


def _runs(row: dict[str, Any]) -> bool:
    """Whether the library runs this kernel as it was timed: FLASH takes graphs of one length only."""
    return row["kernel"] != "flash" or not row.get("dynamic", True)


def record(content: dict[str, Any]) -> None:
    """Write the figures into the summary, with the device and versions of the results."""
    summary.record_results(figures(content), content, "benchmarks/prefill/bench_prefill.py")


def main() -> int:
    """Record the figures of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    record(json.loads(parser.parse_args().results.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The figures of a sweep: one row of it, against dense and its controls, into ``benchmarks/results/summary.json``.

    PYTHONPATH=. python -m benchmarks.quality.figures benchmarks/results/quality_smollm2_fourth.json

The row is a *mask* experiment: exact attention under the tokens that the rule keeps. It says what the
rule is worth, not how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.quality.table import change, retrieved

#: Token granularity, scores of 8 bits in half the head's dimensions, every *query* head choosing for itself. Who is
#: active is judged by those scores, which the library does not do (``library.py`` measures what it does).
ROW = "token256 one-pass fp8 dims32 pool32 per_head d0 t0.96 lazy0.1"


def figures(rows: dict[str, dict[str, Any]], row: str = ROW) -> dict[str, tuple[float, str, str]]:
    """Name -> (value, unit, baseline) of one row at 8K.

    Args:
        rows: The ``rows`` of a results file; ``dense`` and both controls of ``row`` among them.
        row: Name of the row.

    Raises:
        KeyError: If a row or a task is missing.
    """
    own, dense, window, random = (rows[name] for name in (row, "dense", f"{row} ~ window", f"{row} ~ random"))
    ppl, items = "ppl:8192", "items:8192"
    right = {name: 100 * retrieved(x[items]) for name, x in (("own", own), ("dense", dense))}
    gains = {name: right["own"] - 100 * retrieved(x[items]) for name, x in (("window", window), ("random", random))}
    rule = f"SmolLM2-135M, masks of '{row}'"
    return {
        "smollm2.ppl_delta_pct.8k": (change(own[ppl], dense[ppl]), "%", f"dense; {rule}"),
        "smollm2.retrieval_loss_points.8k": (right["dense"] - right["own"], "points", f"dense; {rule}; 224 items"),
        "smollm2.retrieval_gain_over_window.8k": (gains["window"], "points", "sinks + window, equal density"),
        "smollm2.retrieval_gain_over_random.8k": (gains["random"], "points", "random keys, same budget rule"),
        "smollm2.density.8k": (own[ppl]["density"], "share", f"dense causal FLOPs; scoring included; {rule}"),
        "smollm2.attention_density.8k": (own[ppl]["attention"], "share", f"the same without scoring; {rule}"),
        "smollm2.discarded_share_of_lazy": (own[ppl]["discarded_of_lazy"], "share", f"of the lazy queries; {rule}"),
    }


def main() -> int:
    """Record the figures of a results file."""
    from benchmarks.common import summary

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--row", default=ROW)
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    for name, (value, unit, baseline) in figures(results["rows"], options.row).items():
        where = {"device": results["device"], "torch_version": results["torch"]}
        summary.record(name, round(value, 4), unit=unit, baseline=baseline, script=__file__, **where)
        print(f"{name} = {value:.4f} {unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The figures of ``bench_quality_speed.py``'s results: speed at the rules whose quality was measured.

PYTHONPATH=$PWD python3 benchmarks/quality_speed_figures.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import summary  # beside this file

RESULTS = Path(__file__).resolve().parent / "results" / "quality_speed.json"
K = 1024
#: Figure -> (kind, visual tokens, data of the cases it takes the slowest of).
FIGURES = {
    "quality_speed.32k": ("production", 32 * K, ("real pattern", "random")),
    "quality_speed.128k": ("production", 128 * K, ("random",)),
    "quality_speed.real.32k": ("real", 32 * K, ("real",)),
    "quality_speed.real.128k": ("real", 128 * K, ("real",)),
}


def figures(content: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Name -> (speed-up, baseline); a figure whose cases were not all measured is left out."""
    found = {}
    for name, (kind, tokens, wanted) in FIGURES.items():
        rows = [r for r in content["rows"] if (r["kind"], r["visual_tokens"]) == (kind, tokens) and r["data"] in wanted]
        if {row["data"] for row in rows} == set(wanted):
            slowest = min(rows, key=lambda row: row["speedup"])
            found[name] = (round(slowest["speedup"], 3), _baseline(content, slowest))
    return found


def _baseline(content: dict[str, Any], row: dict[str, Any]) -> str:
    heads, kv_heads, dim = row["heads"]
    tested = content["quality"][str(content["base_tokens"])]
    parts = [
        f"{row['fastest_dense']}, fastest dense of the run; selection included",
        f"{heads}/{kv_heads} heads, D={dim}, causal; {row['kept']:.3f} of the blocks, {row['data']} data",
        f"rules with accuracy {tested['accuracy']:.3f} (dense {tested['dense_accuracy']:.3f}) at 32K",
    ]
    if row["visual_tokens"] > content["base_tokens"]:
        how = "video tiled" if row["kind"] == "real" else "kept share of 32K"
        parts.append(f"{how}, quality not measured at this length")
    return "; ".join(parts)


def record(content: dict[str, Any]) -> None:
    """Write the figures into the summary, with the device and versions of the results."""
    where = {"device": content["device"], "torch_version": content["torch"], "tree": content["commit"]}
    for name, (value, baseline) in figures(content).items():
        script = "benchmarks/bench_quality_speed.py"
        summary.record(name, value, unit="x", baseline=baseline, script=script, **where)
        print(f"{name} = {value} x")


def main() -> int:
    """Record the figures of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    record(json.loads(parser.parse_args().results.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

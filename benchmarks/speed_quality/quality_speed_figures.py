"""The figures of ``bench_quality_speed.py``'s results: speed at the rules whose quality was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.common import summary

K = 1024
#: Figure -> (kind, visual tokens, data of the cases it takes the slowest of).
FIGURES = {
    "quality_speed.32k": ("production", 32 * K, ("real pattern", "random")),
    "quality_speed.128k": ("production", 128 * K, ("random",)),
    "quality_speed.real.32k": ("real", 32 * K, ("real",)),
    "quality_speed.real.128k": ("real", 128 * K, ("real",)),
}


def figures(content: dict[str, Any]) -> dict[str, tuple[float, str, str]]:
    """Name -> (speed-up, unit, baseline); a figure whose cases were not all measured is left out."""
    found = {}
    for name, (kind, tokens, wanted) in FIGURES.items():
        rows = [r for r in content["rows"] if (r["kind"], r["visual_tokens"]) == (kind, tokens) and r["data"] in wanted]
        if {row["data"] for row in rows} == set(wanted):
            slowest = min(rows, key=lambda row: row["speedup"])
            found[name] = (round(slowest["speedup"], 3), "x", _baseline(content, slowest))
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
    summary.record_results(figures(content), content, "benchmarks/speed_quality/bench_quality_speed.py")

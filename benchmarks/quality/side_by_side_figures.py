"""The table of a side-by-side run, and its figures into ``benchmarks/results/summary.json``.

PYTHONPATH=. python -m benchmarks.quality.side_by_side_figures [--file FILE] [--record]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import summary
from benchmarks.quality.side_by_side import RESULTS

#: The row of the default rule, through the library; its shares are those of the same rule's masks.
DEFAULT = "peak, 64 keys, window 128"
MASKS = ", as masks"
SCRIPT = Path(__file__).with_name("side_by_side.py")
Rows = Mapping[str, Mapping[str, Any]]


def mean(rows: Rows, name: str, tokens: int, windows: Sequence[str] | None = None) -> dict[str, float]:
    """Means of a row over its windows of a length, the perplexity change against dense (``change``, %) among them.

    Args:
        rows: Of a results file, ``dense`` among them.
        name: A row.
        tokens: Length of the windows.
        windows: Names of the windows to take; None: all that the row has.

    Returns:
        Empty where the row has none.
    """
    found = {w: x for w, x in rows.get(name, {}).items() if w.startswith(f"{tokens}:") and w in rows["dense"]}
    found = {w: x for w, x in found.items() if windows is None or w in windows}
    if not found:
        return {}
    keys = {key for x in found.values() for key in x} - {"seconds"}
    means = {key: sum(x[key] for x in found.values() if key in x) / len(found) for key in keys}
    gaps = [x["nll"] - rows["dense"][w]["nll"] for w, x in found.items()]
    return {**means, "change": 100 * math.expm1(sum(gaps) / len(gaps)), "windows": len(found)}


def table(rows: Rows, tokens: int) -> str:
    """Markdown: one line for each rule."""
    head = (
        "rule",
        "kept",
        "density",
        "perplexity",
        "KL",
        "top-1",
        "recall: mean, 5th percentile, worst head",
        "windows",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in rows:
        own = mean(rows, name, tokens)
        if not own or name == "dense":
            continue
        shares = own if "kept" in own else mean(rows, name + MASKS, tokens, list(rows[name]))
        cells = [_number(shares, "kept", ".3f")]
        cells.append(f"{shares['kept'] + shares['scores']:.3f}" if "scores" in shares else "")
        cells += [f"{own['change']:+.2f} %", f"{own['kl']:.4f}", f"{own['top1']:.3f}"]
        cells.append(", ".join(_number(shares, key, ".3f") for key in ("recall", "recall_5th", "recall_worst_head")))
        lines.append("| " + " | ".join([name, *cells, str(own["windows"])]) + " |")
    return "\n".join(lines)


def _number(values: Mapping[str, float], key: str, form: str) -> str:
    return format(values[key], form) if key in values else ""


def needed(points: Sequence[tuple[float, float]], change: float) -> tuple[float, str]:
    """The kept share at which a rule loses ``change``, between its measured points of (loss, kept).

    Returns:
        The share, and in words whether it was measured: where no point loses so little, that of the best is a lower
        bound.
    """
    ordered = sorted(points)
    for (less, more_kept), (loss, kept) in itertools.pairwise(ordered):
        if less <= change <= loss:
            part = (change - less) / max(loss - less, 1e-9)
            return more_kept + part * (kept - more_kept), "between measured thresholds"
    return (
        (ordered[0][1], "or more: no threshold loses so little")
        if change < ordered[0][0]
        else (ordered[-1][1], "or less")
    )


def figures(rows: Rows, tokens: int = 8192) -> dict[str, tuple[float, str, str]]:
    """Name -> (value, unit, baseline) of the default rule."""
    own, shares = mean(rows, DEFAULT, tokens), mean(rows, DEFAULT + MASKS, tokens)
    former, former_kept = mean(rows, "counted mass", tokens), mean(rows, "counted mass" + MASKS, tokens)
    windows = f"SmolLM2-135M, {own['windows']} windows of {tokens} tokens, through the library on a CPU"
    size = f"{tokens // 1024}k"
    found = {
        f"peak.ppl_delta_pct.{size}": (own["change"], "%", f"dense; {windows}"),
        f"peak.kl.{size}": (own["kl"], "nats", f"dense next-token distributions; {windows}"),
        f"peak.top1.{size}": (own["top1"], "share, 0-1", f"positions where dense prefers the same token; {windows}"),
        f"peak.kept.{size}": (shares["kept"], "share, 0-1", f"causal block pairs; {windows}"),
        f"peak.density.{size}": (shares["kept"] + shares["scores"], "share, 0-1", f"with scores; {windows}"),
        f"peak.recall_difference.{size}": (
            abs(shares["told_recall"] - shares["recall"]), "share, 0-1",
            f"recall that the call reports against that of 32 other rows of each head, mean; {windows}",
        ),
    }  # fmt: skip
    if former and former_kept:
        rule = f"the former default, which keeps {former_kept['kept']:.3f}; {windows}"
        found[f"peak.kl_over_former.{size}"] = (own["kl"] / former["kl"], "x", rule)
        found[f"peak.kept_over_former.{size}"] = (shares["kept"] / former_kept["kept"], "x", rule)
    rival = [
        (x["change"], x["kept"]) for name in rows if name.startswith("XAttention") and (x := mean(rows, name, tokens))
    ]
    if rival:
        kept, how = needed(rival, own["change"])
        told = f"kept share of XAttention's rule, own code, at that perplexity: {kept:.3f}, {how}; {windows}"
        found["peak.kept_over_xattention"] = (shares["kept"] / kept, "x", told)
    return {name: (round(value, 4), unit, baseline) for name, (value, unit, baseline) in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; ``--record`` writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=RESULTS)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args(arguments)
    content = json.loads(options.file.read_text())
    lengths = sorted({int(window.partition(":")[0]) for window in content["rows"]["dense"]})
    for tokens in lengths:
        print(f"{tokens} tokens\n\n{table(content['rows'], tokens)}\n")
    if options.record:
        summary.record_results(figures(content["rows"]), content, str(SCRIPT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

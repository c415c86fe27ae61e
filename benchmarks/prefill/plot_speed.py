"""Pictures of the speed results: what is measured, against the fastest dense kernel of the same run.

python3 -m benchmarks.prefill.plot_speed benchmarks/results/prefill.json benchmarks/results/prefill.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

#: The share of the blocks that the picture is about.
SHARE = 0.1


def series(content: dict[str, Any]) -> dict[str, list[tuple[int, float, float]]]:
    """Kernel -> (tokens, speed-up of a call, speed-up of its device time), by length."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for row in sorted(content["rows"], key=lambda row: row["tokens"]):
        if row["asked"] == SHARE and "attention_ms" in row:
            dense = min(content["dense_ms"][str(row["tokens"])].values())
            on_device = dense / (row["attention_ms"] + row["selection_ms"])
            found.setdefault(row["kernel"], []).append((row["tokens"], dense / row["median"], on_device))
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """One line per kernel for calls, a dashed one for device time; the limit is one over the share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (kernel, points) in enumerate(series(content).items()):
        tokens, calls, device = zip(*points, strict=True)
        axes.plot(tokens, calls, "o-", color=f"C{number}", label=f"{kernel}, call")
        axes.plot(tokens, device, "o--", color=f"C{number}", alpha=0.5, label=f"{kernel}, device time")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel="x of the fastest dense kernel")
    axes.set_title(f"{content['device']}: prefill attention at {SHARE:.0%} of the blocks, random data", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text()), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

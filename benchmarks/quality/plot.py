"""The results as a picture: perplexity and retrieval against total cost, selection included.

``python -m benchmarks.quality.plot RESULTS.json PICTURE.png``. Needs matplotlib; the lab does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.table import change, retrieved, table


def points(rows: dict[str, dict[str, Any]], task: str) -> list[tuple[str, float, float, float]]:
    """``(row, attention, attention + selection, quality)``: Δ perplexity in percent, or retrieval loss in points."""
    dense, found = rows["dense"].get(task), []
    for name, row in rows.items():
        if name == "dense" or task not in row or dense is None:
            continue
        loss = change(row[task], dense) if task.startswith("ppl") else 100 * (retrieved(dense) - retrieved(row[task]))
        found.append((name, row[task]["attention"], row[task]["density"], loss))
    return found


def draw(rows: dict[str, dict[str, Any]], picture: Path) -> None:
    """One panel per task; a point is a row at its total cost, its whisker reaches back to the attention alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = sorted({task for row in rows.values() for task in row if ":" in task}, reverse=True)
    figure, axes = pyplot.subplots(len(tasks), 1, figsize=(11, 6 * len(tasks)), squeeze=False)
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        for name, attention, total, loss in points(rows, task):
            control = " ~ " in name
            axis.plot([attention, total], [loss, loss], color="0.8", linewidth=1)
            axis.plot(total, loss, marker="x" if control else "o", color="0.5" if control else "C0")
            axis.annotate(name, (total, loss), fontsize=6, xytext=(4, 2), textcoords="offset points")
        axis.axhline(0, color="0.6", linewidth=0.5)
        axis.set_xlabel("share of dense causal attention FLOPs, whole model: attention + selection")
        axis.set_ylabel("Δ perplexity, %" if task.startswith("ppl") else "retrieval lost, points")
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_title(task)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and draw the picture of a results file."""
    results, picture = map(Path, sys.argv[1:] if arguments is None else arguments)
    rows = json.loads(results.read_text())["rows"]
    print(table(rows))
    draw(rows, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

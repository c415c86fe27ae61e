"""What a comparison leaves: JSON, a table, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from video_needle import plot
from video_needle.evaluate import MEAN_CHANCE


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| checkpoint | tokens | inference | density | accuracy | points behind dense |",
        "|---|---:|---|---:|---|---|",
    ]
    for row in rows:
        low, high = (100 * x for x in row["interval"])
        loss, least, most = row["points_behind_dense"]
        cells = (row["checkpoint"], str(row["length"]), row["inference"], f"{row['density']:.3f}")
        lines.append(f"| {' | '.join(cells)} | {100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]")
        lines[-1] += f" | {loss:.1f} [{least:.1f}, {most:.1f}] |"
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """JSON, table and plot of the runs so far."""
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    content = {"chance": MEAN_CHANCE, "rows": rows, "torch": torch.__version__, "device": name}
    (out / "compare.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "compare.md").write_text(table(rows) + "\n")
    plot.frontier(rows, MEAN_CHANCE, out / "compare.png")

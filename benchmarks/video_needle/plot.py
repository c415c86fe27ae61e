"""Pictures of what the JSON files hold."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

#: Series in fixed order; colours that colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def curves(history: list[dict[str, Any]], path: Path) -> None:
    """Losses and accuracy by kind over the steps; does nothing where matplotlib is not installed."""
    if not history or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [entry["step"] for entry in history]
    for i, name in enumerate(("answer_loss", "narration_loss")):
        upper.plot(steps, [entry[name] for entry in history], color=COLOURS[i], label=name.replace("_", " "))
    for i, kind in enumerate(history[0]["accuracy"]):
        lower.plot(steps, [entry["accuracy"][kind] for entry in history], color=COLOURS[i], label=kind)
    for before, after in itertools.pairwise(history):
        if after["length"] != before["length"]:
            upper.axvline(after["step"], color="0.8", zorder=0)
            upper.annotate(f"{after['length']} tokens", (after["step"], upper.get_ylim()[1]), va="top", color="0.4")
    upper.set_ylabel("cross entropy")
    lower.set(ylabel="accuracy on new videos", xlabel="optimizer step", ylim=(0, 1.02))
    for axes in (upper, lower):
        axes.legend(frameon=False, ncols=3, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def frontier(rows: list[dict[str, Any]], chance: float, path: Path) -> None:
    """Accuracy over density, a panel for each length; does nothing where matplotlib is not installed."""
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(4.2 * len(lengths), 4), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        series: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            blind = row["family"] in ("last frame only", "text only")
            if row["length"] == length and not blind and "kv_ratio" not in row:
                series.setdefault(f"{row['checkpoint']}: {row['family']}", []).append(row)
        for i, (label, members) in enumerate(series.items()):
            members.sort(key=lambda row: row["density"])
            density, accuracy = ([row[key] for row in members] for key in ("density", "accuracy"))
            bars = [[abs(row["interval"][side] - row["accuracy"]) for row in members] for side in (0, 1)]
            axes.errorbar(density, accuracy, bars, color=COLOURS[i % len(COLOURS)], marker="o", ms=4, label=label)
        axes.axhline(chance, color="0.6", linestyle=":")
        axes.set(title=f"{length} visual tokens", xlabel="density of the whole model", xscale="log", ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)

"""What the fine-tuning experiment leaves: JSON, a table, a plot, the summary's figures."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import summary
from benchmarks.common.intervals import interval

#: The figures are of this length, of the whole model, and of the densest sparse row up to this density.
TOKENS, LAYERS, DENSITY = 8192, 30, 0.2


def versions() -> dict[str, str]:
    """What measured it."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": summary.device_name()}


def find(content: dict[str, Any], weights: str, inference: str) -> list[dict[str, Any]]:
    """Rows of some weights under some inference."""
    return [row for row in content["rows"] if row["weights"] == weights and row["inference"] == inference]


def behind(content: dict[str, Any], row: dict[str, Any]) -> tuple[float, float, float] | None:
    """Perplexity against dense inference of equally trained dense weights, per cent; paired interval over windows.

    Returns:
        ``(mean, low, high)``, or None while the baseline is missing.
    """
    baseline = find(content, "pretrained" if row["weights"] == "pretrained" else "tuned dense", "dense")
    if not baseline:
        return None
    more = np.asarray(row["losses"]) - np.asarray(baseline[0]["losses"])
    mean, low, high = interval(more, np.arange(len(more)))
    return tuple(100 * math.expm1(x) for x in (mean, low, high))  # type: ignore[return-value]


def table(content: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| weights | inference | density | perplexity | against dense, equally trained |",
        "|---|---|---:|---:|---|",
    ]
    for row in content["rows"]:
        more = behind(content, row)
        how = (
            row["inference"] if row["trained_with"] is None else f"{row['inference']} (trained: {row['trained_with']})"
        )
        how += " at the trained target" if row["wanted"] is None and row["inference"] != "dense" else ""
        change = "" if more is None else f"{more[0]:+.2f} % [{more[1]:+.2f}, {more[2]:+.2f}]"
        perplexity = math.exp(sum(row["losses"]) / len(row["losses"]))
        lines.append(f"| {row['weights']} | {how} | {row['density']:.3f} | {perplexity:.3f} | {change} |")
    return "\n".join(lines)


def write(content: dict[str, Any], out: Path) -> None:
    """JSON, table and plot of what there is so far."""
    summary.write_json(content, out)
    out.with_suffix(".md").write_text(table(content) + "\n")
    plot(content, out.with_suffix(".png"))


def plot(content: dict[str, Any], path: Path) -> None:
    """Cost in perplexity over density, a line for each weights and scorer; nothing where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in content["rows"]:
        more = behind(content, row)
        if row["inference"] != "dense" and more is not None:
            lines.setdefault(f"{row['weights']}, {row['inference']}", []).append((row["density"], *more))
    if not lines:
        return
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        density, mean, low, high = zip(*sorted(points), strict=True)
        bars = [[m - x for m, x in zip(mean, low, strict=True)], [x - m for m, x in zip(mean, high, strict=True)]]
        axes.errorbar(density, mean, bars, marker="o", ms=4, label=label)
    axes.axhline(0, color="0.7")
    axes.set(xlabel="density of the whole model", ylabel="perplexity against equally trained dense, %")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def keep_figures(content: dict[str, Any], scoring: str, script: str, path: Path = summary.SUMMARY) -> list[str]:
    """Record the summary's figures; only of the whole model at the length that their names say.

    Returns:
        The names recorded.
    """
    if content["plan"]["tokens"] != TOKENS or content["layers"] != LAYERS:
        return []
    within = [row for row in find(content, "tuned sparse", scoring) if row["density"] <= DENSITY]
    row = max(within, key=lambda row: row["density"], default=None)
    change = None if row is None else behind(content, row)
    if row is None or change is None:
        return []
    steps = content["plan"]["steps"]
    told = f"{scoring}, {steps} steps, {content['held_out_windows']} held-out windows"
    values = [
        ("finetuned.ppl_delta_pct.8k", change[0], "%", f"equally fine-tuned dense model, dense inference; {told}"),
        ("finetuned.density.8k", row["density"], "share, 0-1", f"dense causal attention FLOPs, whole model; {told}"),
    ]
    near = lambda other: abs(other["density"] - row["density"])  # noqa: E731
    other = min(find(content, "pretrained", scoring), key=near, default=None)
    change = None if other is None else behind(content, other)
    if other is not None and change is not None:
        told = f"pretrained model, dense inference; {scoring}, density {other['density']:.3f}"
        values.append(("training_free.ppl_delta_pct.8k", change[0], "%", told))
    where = {"device": content["device"], "torch_version": content["torch"], "path": path}
    for name, value, unit, baseline in values:
        summary.record(f"smollm2.{name}", value, unit=unit, baseline=baseline, script=script, **where)
    return [f"smollm2.{name}" for name, *_ in values]

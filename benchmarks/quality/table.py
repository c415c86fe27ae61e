"""The results as a table: quality against what it cost."""

from __future__ import annotations

import math
from typing import Any


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, one line per row and length; perplexity and retrieval as changes to the dense row.

    Args:
        rows: The ``rows`` of a results file.
    """
    head = ("row", "N", "Δppl %", "Δppl late %", "retrieval", "density", "attention", "selection", "rectangle")
    lines = ["| " + " | ".join((*head, "recall mean/min", "active")) + " |", "|---|" + "---:|" * (len(head) + 1)]
    for name, row in rows.items():
        for task in sorted(row, key=lambda task: (task.partition(":")[0] != "ppl", task)):
            if ":" in task:
                lines.append("| " + " | ".join(_cells(name, task, row[task], rows.get("dense", {}).get(task))) + " |")
    return "\n".join(lines)


def change(result: dict[str, Any], dense: dict[str, Any], key: str = "nll") -> float:
    """Perplexity change in percent, geometric mean over the texts."""
    gaps = [result[key][name] - dense[key][name] for name in result[key]]
    return 100 * math.expm1(sum(gaps) / len(gaps))


def retrieved(result: dict[str, Any]) -> float:
    """Share of all look-up items ranked right, over the formats."""
    kinds = [value for value in result.values() if isinstance(value, dict) and "rank" in value]
    return sum(kind["rank"] * kind["items"] for kind in kinds) / sum(kind["items"] for kind in kinds)


def _cells(name: str, task: str, result: dict[str, Any], dense: dict[str, Any] | None) -> tuple[str, ...]:
    kind, _, tokens = task.partition(":")
    if kind == "ppl" and dense is not None:
        quality = (f"{change(result, dense):+.2f}", f"{change(result, dense, 'late'):+.2f}", "")
    else:
        formats = [f"{k} {v['rank']:.3f}" for k, v in result.items() if isinstance(v, dict) and "rank" in v]
        quality = ("", "", ", ".join(formats))
    shares = (f"{result[key]:.3f}" for key in ("density", "attention", "selection", "rectangle"))
    recall = f"{result['recall_mean']:.3f}/{result['recall_min']:.3f}"
    return (name, tokens, *quality, *shares, recall, f"{result['active']:.2f}")

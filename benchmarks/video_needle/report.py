"""What a comparison leaves: JSON, a table, a plot, the summary's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import summary  # benchmarks/summary.py
from benchmarks.common.intervals import interval
from benchmarks.video_needle import plot
from benchmarks.video_needle.evaluate import MEAN_CHANCE
from benchmarks.video_needle.vocabulary import KINDS
from omnisparse_flex.errors import require

NAME = "compare.json"
#: Length that was trained, one four times as long; most density, and least cache ratio, that a claim is made at.
TRAINED, LONGER, DENSITY, RATIO = 8192, 32768, 0.15, 2.4
#: Densities that differ by less count as equal.
SAME = 0.005
#: Checkpoints by the names that the figures expect: the dense ones (the second trained for as long as any sparse one),
#: sparse from the start, fine-tuned sparse. Only the first dense one never met the selection.
DENSE, SPARSE, TUNED = ("dense", "dense longer"), "sparse", "tuned"


def read(out: Path) -> list[dict[str, Any]]:
    """The rows of a folder; none where there is no JSON.

    Raises:
        ConfigError: If its JSON is not a comparison's.
    """
    path = out / NAME
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    good = isinstance(content, dict) and all("right" in row and "videos" in row for row in content.get("rows", [{}]))
    require(good, "out", f"hold no other {NAME} than a comparison's", str(path))
    return content["rows"]


def behind(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """Points that ``row`` is behind ``other``, question by question, with a paired interval over videos.

    Only the videos that both were asked about count.
    """
    count = min(len(row["right"]), len(other["right"]))
    ours, theirs = (np.array(list(x["right"][:count])).astype(float) for x in (row, other))
    return tuple(100 * x for x in interval(theirs - ours, np.arange(count) // len(KINDS)))  # type: ignore[return-value]


def find(rows: list[dict[str, Any]], checkpoint: str, length: int, family: str) -> list[dict[str, Any]]:
    """Rows of one checkpoint, length and family, whatever their tag, the densest first."""
    own = [row for row in rows if (row["checkpoint"], row["length"]) == (checkpoint, length)]
    found = [row for row in own if row["family"] == family or row["family"].startswith(f"{family}, ")]
    return sorted(found, key=lambda row: -row["density"])


def table(rows: list[dict[str, Any]], only: str | None = None) -> str:
    """The rows in Markdown; each against its own checkpoint's dense inference, and against the first checkpoint's.

    Args:
        rows: All there are.
        only: The checkpoint whose rows are shown; None: all.
    """
    lines = [
        "| checkpoint | tokens | inference | density | cache | accuracy | behind its own dense | behind dense |",
        "|---|---:|---|---:|---:|---|---|---|",
    ]
    for row in (row for row in rows if only in (None, row["checkpoint"])):
        low, high = (100 * x for x in row["interval"])
        name = row["inference"]
        cache = f"{row['kv_ratio']:.2f}x" if row.get("wanted_ratio") else ""
        cells = [row["checkpoint"], str(row["length"]), name, f"{row['density']:.3f}", cache]
        cells.append(f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]")
        # A cache's questions stand alone: they are compared with the full cache's.
        how = name.partition(" cache")[2].partition(", after")[0]
        baseline = f"full cache{how}" if " cache" in name else "dense"
        for checkpoint in (row["checkpoint"], rows[0]["checkpoint"]):
            found = [r for r in rows if (r["checkpoint"], r["length"]) == (checkpoint, row["length"])]
            found = [r for r in found if r["inference"] == baseline]
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*behind(row, found[0])) if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """JSON, table and plot of the runs so far."""
    content = {"chance": MEAN_CHANCE, "rows": rows, "torch": torch.__version__, "device": summary.device_name()}
    summary.write_json(content, out / NAME)
    (out / "compare.md").write_text(table(rows) + "\n")
    plot.frontier(rows, MEAN_CHANCE, out / "compare.png")


def keep_figures(rows: list[dict[str, Any]], path: Path = summary.SUMMARY, **measured: str) -> list[str]:
    """Record every figure that the rows can give: at the trained length, the most accurate row within ``DENSITY``.

    Dense inference is that of the better dense checkpoint; controls, losses and the cache's ratio are those of the
    better of the two checkpoints trained with sparsity.

    Args:
        rows: Of a comparison.
        path: The summary file.
        **measured: ``device``, ``torch_version`` and ``tree`` of rows from elsewhere; as ``summary.record`` takes them.

    Returns:
        The names recorded.
    """
    figures: dict[str, tuple[float, str, str]] = {"video.chance": (MEAN_CHANCE, "share, 0-1", "mean over kinds")}

    def best(checkpoint: str, family: str, length: int = TRAINED) -> dict[str, Any] | None:
        own = [r for r in find(rows, checkpoint, length, family) if family == "dense" or r["density"] <= DENSITY]
        return max(own, key=lambda row: (row["accuracy"], -row["density"]), default=None)

    def accuracy(name: str, row: dict[str, Any] | None) -> None:
        if row is not None:
            told = f"{row['checkpoint']}, {row['inference']}; {row['questions']} questions, {row['length']} tokens"
            figures[f"video.accuracy.{name}"] = (row["accuracy"], "share, 0-1", f"{told}, density {row['density']:.3f}")

    trained = (best(name, "dense") for name in DENSE)
    dense = max((row for row in trained if row), key=lambda row: row["accuracy"], default=None)
    baseline = DENSE[0] if dense is None else dense["checkpoint"]
    sparse = best(SPARSE, "OmniSparse")
    accuracy("dense", dense)
    accuracy("sparse_trained", sparse)
    accuracy("sparse_finetuned", best(TUNED, "OmniSparse"))
    accuracy("sparse_training_free", best(DENSE[0], "OmniSparse"))
    accuracy("dense.4x_length", best(baseline, "dense", LONGER))
    accuracy("sparse_trained.4x_length", best(SPARSE, "OmniSparse", LONGER))
    accuracy("sparse_finetuned.4x_length", best(TUNED, "OmniSparse", LONGER))
    aware = max((r for r in (sparse, best(TUNED, "OmniSparse")) if r), key=lambda row: row["accuracy"], default=None)
    if aware is not None:
        for name, control in (("window_only", "window only"), ("random", "random")):
            far = lambda row: abs(row["density"] - aware["density"])  # noqa: E731
            nearest = min(find(rows, aware["checkpoint"], TRAINED, control), key=far, default=None)
            accuracy(name, nearest if nearest and far(nearest) <= SAME else None)
        figures["video.density"] = (aware["density"], "share, 0-1", "dense causal attention FLOPs, whole model")
    if dense is not None and aware is not None:
        loss, low, high = behind(aware, dense)
        told = f"{baseline} minus sparse of checkpoint {aware['checkpoint']}, the same {dense['questions']} questions"
        figures["video.loss_points"] = (loss, "points", told)
        figures["video.ci_points"] = (high - low, "points", f"width of the paired 95 % interval; {told}")
    blind = find(rows, baseline, TRAINED, "text only")
    if blind:
        figures["video.text_only_accuracy"] = (blind[0]["accuracy"], "share, 0-1", "no event is drawn")
    slim = [] if aware is None else find(rows, aware["checkpoint"], TRAINED, "cache, question known")
    slim = [row for row in slim if row.get("wanted_ratio") == RATIO]
    if slim:
        told = f"full cache; accuracy {slim[0]['accuracy']:.3f} of {slim[0]['questions']} questions"
        figures["video.kv_ratio"] = (slim[0]["kv_ratio"], "x", told)
    script = Path(__file__).with_name("compare.py")
    for name, (value, unit, baseline) in figures.items():
        summary.record(name, float(value), unit=unit, baseline=baseline, script=script, path=path, **measured)
    return sorted(figures)

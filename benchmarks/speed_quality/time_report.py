"""The table and the picture of ``time_quality``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any


def table(content: dict[str, Any]) -> str:
    """Markdown: timed rows by total time at the longest length, the others by attention time, then equal times."""
    lengths = list(content["dense_ms"])
    names = [f"{int(n) // 1024}K" for n in lengths]
    timed, others = (
        [r for r in content["rows"] if (r["times"][lengths[-1]]["ratio"] is None) == x] for x in (False, True)
    )
    lines = ["# Attention time against quality", ""]
    lines += [f"- {note}" for note in content["notes"]]
    dense = ", ".join(f"{content['dense_ms'][n]:.1f} ms at {name}" for n, name in zip(lengths, names, strict=True))
    lines += [f"- Fastest dense kernel: {dense}; blocks: kernel `{content['kernel']}`.", ""]
    lines += ["## Estimators with a measured selection, by total time", "", *_rows(timed, lengths, names, "ratio"), ""]
    for length, name in zip(lengths, names, strict=True):
        front = ", ".join(f"`{x}`" for x in content["front"][length])
        lines += [f"Pareto front at {name}: {front}.", ""]
    lines += ["A lower bound of a time beats only its like. Rows with more keys than measured have no place there.", ""]
    lines += ["## Estimators whose selection was not timed: attention alone, not in the picture", ""]
    lines += [*_rows(others, lengths, names, "attention_ratio"), "", "## Budget rules at equal time", ""]
    lines += ["Same estimator, unit, heads and lazy rule; times as shares of the fastest dense kernel. Two estimators"]
    lines += ["stand together where the rows of one alone do not decide: the gap holds their difference too.", ""]
    for length, name in zip(lengths, names, strict=True):
        found = content["iso_time"][length]
        wins = Counter(x["winner"] or "open" for x in found)
        said = ", ".join(f"{who} {count}" for who, count in wins.most_common())
        lines += [f"### {name}: {said}, of {len(found)} comparisons", "", *map(_verdict, found), ""]
    lines += ["### Not comparable", "", *(f"- {line}" for line in content["missing"]), ""]
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]], lengths: list[str], names: list[str], key: str) -> list[str]:
    head = ("row", "estimator", "budget", "heads", "Δppl %", "look-ups lost (4K)", "kept", "active", "keys")
    lines = ["| " + " | ".join((*head, *names, "outside of the measured")) + " |"]
    lines += ["|---|---|---|---|" + "---:|" * (len(head) - 4 + len(names)) + "---|"]
    for row in rows:
        lost = "" if row["lost"] is None else f"{row['lost']:+.1f}"
        shares = (f"{row[x]:.3f}" for x in ("kept", "active", "keys"))
        times = (f"{row['times'][n]['bound']}{row['times'][n][key]:.3f}" for n in lengths)
        outside = {
            f"{name} {share['value']:.3f} → {share['taken']:.3f} ({label})"
            for n, label in zip(lengths, names, strict=True)
            for name, share in row["times"][n]["clipped"].items()
        }
        cells = (row["name"], row["estimator"], row["budget"], row["heads"], f"{row['change']:+.2f}", lost)
        lines.append("| " + " | ".join((*cells, *shares, *times, "; ".join(sorted(outside)))) + " |")
    return lines


def _verdict(entry: dict[str, Any]) -> str:
    what = f"{entry['granularity']} {entry['unit'] if entry['unit'] > 1 else ''}".strip()
    where = (
        f"{what}, {' and '.join(entry['estimators'])} ({entry['scorer']}), heads {entry['heads']}, lazy {entry['lazy']}"
    )
    time = "total time" if entry["selection_included"] else "attention time, the selection being the same"
    won = f"**{entry['winner']}** by {entry['gap']:.2f} points" if entry["winner"] else "**open**"
    return f"- {where}: {won}, {entry['how']} ({time}): {entry['text']}."


def _short(row: dict[str, Any]) -> str:
    rule = row["rule"]
    words = [{"flattest_head": "flattest", "per_head": "per head"}.get(row["budget"], "fixed"), f"t{rule['target']}"]
    words += [f"lazy{rule['lazy']}"] if rule["lazy"] is not None else []
    words += ["window1"] if rule["window"] == 1 else []
    return " ".join([*words, f"gqa-{rule['gqa']}"] if row["granularity"] == "token" else words)


def draw(content: dict[str, Any], picture: Path) -> None:
    """One panel per length: squares are blocks, circles tokens, hollow ones take more time than drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(content["dense_ms"])
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=(7.5 * len(lengths), 6), squeeze=False, layout="constrained"
    )
    shown = [row for row in content["rows"] if row["times"][lengths[-1]]["ratio"] is not None]
    colours = {name: f"C{i}" for i, name in enumerate(sorted({row["estimator"] for row in shown}))}
    for axis, length in zip(axes[0], lengths, strict=True):
        for number, row in enumerate(shown):
            time, colour = row["times"][length], colours[row["estimator"]]
            marker = "s" if row["granularity"] == "block" else "o"
            face = "none" if time["bound"] in ("≥", "~") else colour
            spot = (time["ratio"], row["change"])
            axis.plot(*spot, marker=marker, linestyle="", color=colour, markerfacecolor=face)
            axis.annotate(_short(row), spot, fontsize=6, xytext=(6, (2, -8)[number % 2]), textcoords="offset points")
        best = {row["name"]: (row["times"][length]["ratio"], row["change"]) for row in shown}
        line = [best[name] for name in content["front"][length]]
        axis.step(*zip(*line, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
        for name, colour in colours.items():
            axis.plot([], [], marker="s", linestyle="", color=colour, label=name)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axhline(0, color="0.6", linewidth=0.5)
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set(xlim=(0, None), ylim=(min(-0.3, *(x[1] for x in best.values())), 30))
        axis.set(xlabel="total attention time, fastest dense kernel = 1", ylabel="Δ perplexity, % (8K)")
        axis.set_title(f"{int(length) // 1024}K: quality of 8K, times on random data", fontsize=10)
        axis.legend(fontsize=8, title="□ blocks, ○ tokens; hollow: takes longer", title_fontsize=7)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)

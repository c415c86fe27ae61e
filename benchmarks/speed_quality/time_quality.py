"""Total attention time against quality, for every estimator of the lab, and budget rules at equal time.

    PYTHONPATH=. python -m benchmarks.speed_quality.time_quality

Nothing is measured here: two kinds of measurements are joined. **Quality** is SmolLM2-135M at 8K under exact attention
within a rule's mask (``benchmarks.quality``). **Time** is modelled (``time_model``) from the H200's at 28/4 heads,
D=128 and random data, at 32K and 128K, by the shares that the rule kept *at 8K*. Shares would fall with length, which
makes these times too long; no quality was measured there. A dense layer counts as the fastest dense kernel. Estimators
whose selection was not timed keep their attention time and stay out of the picture. A share beyond what was measured
takes the nearest measured one; then the time is a bound, marked so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.rules import Rule
from benchmarks.quality.table import change, retrieved
from benchmarks.speed_quality.iso_time import Point, budget_of, granularity, missing, verdicts
from benchmarks.speed_quality.time_model import RESULTS, TimeModel, label

TASK, ITEMS, LENGTHS = "ppl:8192", "items:4096", (32768, 131072)
PLANS = ("second", "third", "fourth", "blocks", "budgets")
QUALITY = ("quality_smollm2", *(f"quality_smollm2_{plan}" for plan in PLANS))
NOTES = (
    "Nothing new was measured. Quality and shares: SmolLM2-135M at 8K, exact attention within masks. Times: H200, 28/4 "
    "heads, D=128, random data, all heads' budgets alike. The shares of 8K stand at 32K and 128K: they would "
    "fall with length, which makes these times too long; no quality was measured there.",
    "A time is one layer's mean, selection and the rule's dense layers included, over the fastest dense kernel at that "
    "length: of both files, as `token.json` has no FlashAttention-4 (`ratio_own_file` in the JSON: of the same file).",
    "≥: a share lies above what was measured and the nearest measured one stands for it: the true time is more. "
    "≤: below. ~: both.",
    "Heads `none`: every query head chose for itself. The kernels choose once per KV head, which costs more: `mean`.",
    "Blocks of 64 take the times of blocks of 128. The block selection holds `last_rows`, which the masks had not.",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule's quality, and the shares that its time follows from.

    Attributes:
        rule: The rule.
        change: Perplexity change in percent.
        lost: Look-up items lost at 4K, in points; None: not measured.
        dense: Share of the layers that are dense.
        kept: Share of the causal pairs that a sparse layer keeps.
        active: Share of its queries that are active.
        keys: Its mean budget over N.
        source: The file.
    """

    rule: Rule
    change: float
    lost: float | None
    dense: float
    kept: float
    active: float
    keys: float
    source: str


def read(files: Iterable[Path]) -> list[Entry]:
    """Every row of the results files that selects by an estimate; of a repeated one the first.

    Args:
        files: Made by ``benchmarks.quality.run``; each with its dense row.
    """
    found: dict[str, Entry] = {}
    for file in files:
        rows = json.loads(file.read_text())["rows"]
        dense = rows["dense"]
        for name, row in rows.items():
            rule = Rule.from_dict(row["rule"])
            if rule.dense or " ~ " in name or TASK not in row or name in found:
                continue
            own, lost = row[TASK], None
            if ITEMS in row and ITEMS in dense:
                lost = 100 * (retrieved(dense[ITEMS]) - retrieved(row[ITEMS]))
            share = len(rule.dense_layers) / (len(rule.dense_layers) + len(own["budget"]))
            kept = (own["attention"] - share) / (1 - share)
            keys = sum(own["budget"].values()) / len(own["budget"]) / int(TASK.partition(":")[2])
            found[name] = Entry(rule, change(own, dense[TASK]), lost, share, kept, own["active"], keys, file.name)
    return list(found.values())


def modelled(entry: Entry, model: TimeModel, tokens: int) -> dict[str, Any]:
    """Times of a row at one length, as shares of the fastest dense one."""
    if granularity(entry.rule) == "block":
        time, file = model.blocks(tokens, entry.kept, label(entry.rule)), "prefill"
    else:
        time, file = model.tokens(tokens, entry.active, entry.keys, label(entry.rule)), "token"
    selection = None if time.selection_ms is None else time.selection_ms / entry.rule.share

    def ratio(dense_ms: float, more: float | None = 0.0) -> float | None:
        return None if more is None else entry.dense + (1 - entry.dense) * (time.attention_ms + more) / dense_ms

    signs = {share.above for share in time.clipped.values()}
    return {
        "attention_ms": time.attention_ms,
        "selection_ms": selection,
        "attention_ratio": ratio(model.dense_ms(tokens)),
        "ratio": ratio(model.dense_ms(tokens), selection),
        "ratio_own_file": ratio(model.dense_ms(tokens, [file]), selection),
        "clipped": {name: dataclasses.asdict(share) for name, share in time.clipped.items()},
        "bound": "" if not signs else "~" if len(signs) > 1 else "≥" if True in signs else "≤",
        "at_least": any(share.above for name, share in time.clipped.items() if name != "active"),
    }


def front(rows: Sequence[dict[str, Any]], tokens: int) -> list[str]:
    """Names of the timed rows that none beats in both, fastest first.

    A lower bound of a time beats only its like, as both have more active queries than were measured; rows whose keys
    or blocks lie above the measured have no place in time and are left out.
    """
    timed = [(row, row["times"][str(tokens)]) for row in rows]
    timed = [(row, time) for row, time in timed if time["ratio"] is not None and not time["at_least"]]

    def beats(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
        better = (one[1]["ratio"], one[0]["change"]), (other[1]["ratio"], other[0]["change"])
        fair = one[1]["bound"] in ("", "≤") or other[1]["bound"] not in ("", "≤")
        return fair and better[0] != better[1] and all(a <= b for a, b in zip(*better, strict=True))

    kept = [x for x in timed if not any(beats(y, x) for y in timed)]
    return [row["name"] for row, _ in sorted(kept, key=lambda x: x[1]["ratio"])]


def joined(entries: Sequence[Entry], model: TimeModel) -> dict[str, Any]:
    """Everything that the table and the picture show."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        about = {key: value for key, value in dataclasses.asdict(entry).items() if key != "rule"}
        about |= {"name": entry.rule.name, "rule": dataclasses.asdict(entry.rule), "estimator": label(entry.rule)}
        about |= {"granularity": granularity(entry.rule), "budget": budget_of(entry.rule), "heads": entry.rule.gqa}
        rows.append({**about, "times": {str(n): modelled(entry, model, n) for n in LENGTHS}})
    last = str(LENGTHS[-1])
    rows.sort(
        key=lambda row: row["times"][last]["ratio"] or 1e3 + row["times"][last]["attention_ratio"]
    )  # untimed last
    iso: dict[str, Any] = {}
    for tokens in LENGTHS:
        points = []
        for entry in entries:
            time = modelled(entry, model, tokens)
            added = None if time["ratio"] is None else time["ratio"] - time["attention_ratio"]
            point = Point(time["attention_ratio"], added, entry.change, time["at_least"], entry.rule.name)
            points.append((entry.rule, point))
        iso[str(tokens)] = verdicts(points)
    return {
        "notes": list(NOTES),
        "kernel": model.kernel,
        "dense_ms": {str(n): model.dense_ms(n) for n in LENGTHS},
        "rows": rows,
        "front": {str(n): front(rows, n) for n in LENGTHS},
        "iso_time": iso,
        "missing": missing(entry.rule for entry in entries),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Join the results and write the table, the JSON and, with matplotlib, the picture."""
    from benchmarks.common.summary import write_json
    from benchmarks.speed_quality.time_report import draw, table

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the measurements")
    parser.add_argument("--out", type=Path, default=RESULTS / "time_quality.json", help=".md and .png lie beside it")
    parser.add_argument("--kernel", choices=("flash", "triton"), default="flash", help="of the blocks")
    options = parser.parse_args(arguments)
    files = [options.results / f"{name}.json" for name in QUALITY]
    content = joined(read(file for file in files if file.exists()), TimeModel(options.results, options.kernel))
    write_json(content, options.out)
    options.out.with_suffix(".md").write_text(table(content))
    try:
        draw(content, options.out.with_suffix(".png"))
    except ImportError:
        print("no picture: matplotlib is not installed")
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())

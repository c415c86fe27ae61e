"""Runs rows of the quality experiment and keeps them as JSON; a second run goes on where the first stopped.

``python -m benchmarks.quality.run --data DIR --plan first --out FILE [--seconds 230] [--quick]``
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.controls import matched_window
from benchmarks.quality.evaluate import perplexity, retrieval
from benchmarks.quality.lab import Lab, install
from benchmarks.quality.plans import PLANS, Row
from benchmarks.quality.prepare import load
from benchmarks.quality.rules import Rule
from benchmarks.quality.table import table
from benchmarks.quality.weights import load_model


class Runner:
    """Model, data and results file of a run.

    Args:
        data: Folder made by ``prepare``.
        out: JSON of results, read first if it exists.
        quick: Few tokens on the CPU: a smoke test, not a measurement.
    """

    def __init__(self, data: Path, out: Path, *, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.texts, self.items = load(data)
        self.model = load_model(data, device=self.device, dtype=torch.float32)
        self.lab: Lab = install(self.model)
        self.rows: dict[str, dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else {}

    def measure(self, row: Row) -> list[str]:
        """Measure what of ``row`` is not in the file yet; returns lines to print."""
        lines = []
        for task in row.tasks:
            rule = self._resolved(row, task)
            entry = self.rows.setdefault(rule.name, {"rule": dataclasses.asdict(rule)})
            if task not in entry:
                entry[task] = {**self._run(rule, task), "window": rule.window}
                self._save()
                lines.append(f"{rule.name:<44} {task:<12} {_brief(entry[task])}")
        return lines

    def _run(self, rule: Rule, task: str) -> dict[str, Any]:
        kind, _, tokens = task.partition(":")
        length = int(tokens)
        if kind == "ppl":
            windows = 1 if self.quick else max(1, 16384 // length)
            texts = {"manual": self.texts["manual"]} if self.quick else self.texts
            return perplexity(self.model, self.lab, rule, texts, length, windows)
        items = {name: found for (name, size), found in self.items.items() if size == length}
        return retrieval(self.model, self.lab, rule, items, 2 if self.quick else 99)

    def _resolved(self, row: Row, task: str) -> Rule:
        """The row's rule; a window control takes its window from the row that it is measured against."""
        rule = _shrunk(row.rule) if self.quick else row.rule
        if row.match is None:
            return rule
        return matched_window(rule, self.rows[row.match][task]["attention"], int(task.partition(":")[2]))

    def _save(self) -> None:
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        text = json.dumps({"device": device, "torch": torch.__version__, "rows": self.rows})
        part = self.out.with_suffix(".part")
        part.write_text(text)
        os.replace(part, self.out)


def _shrunk(rule: Rule) -> Rule:
    """The rule at a quarter of its sizes, so that 1K tokens hold as many segments and windows as 4K."""
    sizes = {name: max(1, getattr(rule, name) // 4) for name in ("segment", "sinks", "window")}
    return dataclasses.replace(rule, **sizes, unit=sizes["segment"] if rule.blocks else rule.unit)


def _brief(result: dict[str, Any]) -> str:
    scores = {k: round(v, 4) for k, v in result.get("nll", {}).items()}
    scores |= {k: round(v["rank"], 3) for k, v in result.items() if isinstance(v, dict) and "rank" in v}
    figures = " ".join(f"{key} {result[key]:.3f}" for key in ("attention", "selection", "recall_mean", "active"))
    return f"{scores} {figures} {result['seconds']} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a plan until it is done or the time is up."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by benchmarks.quality.prepare")
    parser.add_argument("--plan", choices=sorted(PLANS), default="first", help="which rows, most informative first")
    parser.add_argument("--out", type=Path, required=True, help="JSON of results; rows in it are not run again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--quick", action="store_true", help="1K tokens and two contexts: a smoke test for a CPU")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.data, options.out, quick=options.quick)
    rows = [row.at(1024) for row in PLANS[options.plan]] if options.quick else PLANS[options.plan]
    done = 0
    for row in rows:
        if time.perf_counter() - began > options.seconds:
            break
        for line in runner.measure(row):
            print(line, flush=True)
        done += 1
    print(table(runner.rows))
    print(f"{done} of {len(rows)} rows of plan {options.plan!r} done in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

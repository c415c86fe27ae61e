"""Runs of the whole test suite on several versions: kept, told as figures, and the README's line of what was tested.

    make test ARGS="--results=/tmp/pinned.json"
    make test LATEST=1 WITH=transformers==5.17.0 VENV=/tmp/venv517 ARGS="--results=/tmp/oldest.json"
    python -m benchmarks.common.lanes /tmp/pinned.json /tmp/oldest.json

A lane is a version of transformers on the CPU or on a GPU; its last run counts. In README.md the line stands between
``<!-- tested -->`` and ``<!-- tested end -->``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.summary import SUMMARY, record, write_json

ROOT = Path(__file__).resolve().parents[2]
LANES = ROOT / "benchmarks" / "results" / "tests.json"
README = ROOT / "README.md"
START, END = "<!-- tested -->", "<!-- tested end -->"
Lane = Mapping[str, Any]


def name_of(lane: Lane) -> str:
    """``tf_5_24``, or ``gpu_tf_5_24``."""
    release = "_".join(lane["transformers"].split(".")[:2])
    return f"{'gpu_' if lane['gpu'] else ''}tf_{release}"


def failures_of(lane: Lane) -> int:
    """Tests that failed, or whose set-up or tear-down did."""
    return int(lane["failed"]) + int(lane["error"])


def read(path: Path = LANES) -> dict[str, dict[str, Any]]:
    """The kept lanes; empty where there is no file yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def figures_of(lane: Lane) -> dict[str, int]:
    """A lane's figures by their names in the summary."""
    if lane["gpu"]:
        return {
            "tests.gpu_failed": failures_of(lane),
            "tests.gpu_passed": lane["passed"],
            "tests.flash_passed": lane["flash_passed"],
        }
    name = name_of(lane)
    return {f"tests.cpu_failed.{name}": failures_of(lane), f"tests.cpu_passed.{name}": lane["passed"]}


def keep(lane: Lane, *, path: Path = LANES, summary: Path = SUMMARY) -> None:
    """Put a run in its lane's place, and its figures into the summary.

    Args:
        lane: What ``pytest --results`` wrote.
        path: The lanes' file.
        summary: The summary's.
    """
    write_json({**read(path), name_of(lane): dict(lane)}, path)
    told = f"transformers {lane['transformers']}, Python {lane['python']}; {lane['minutes']} minutes"
    for name, value in figures_of(lane).items():
        where = {"device": lane["device"], "torch_version": lane["torch"], "tree": lane["commit"]}
        record(name, value, unit="tests", baseline=told, script=__file__, path=summary, **where)


def tested_line(lanes: Mapping[str, Lane]) -> str:
    """What was tested, in a sentence: versions of transformers by torch, device and Python."""
    if not lanes:
        return "Tested: no run of the whole suite is recorded."
    groups: dict[tuple[str, str, str], list[Lane]] = {}
    for lane in sorted(lanes.values(), key=lambda x: [int(n) for n in x["transformers"].split(".")[:3]]):
        where = lane["device"] if lane["gpu"] else "CPU"
        groups.setdefault((where, lane["torch"].removesuffix("+cpu"), lane["python"]), []).append(lane)
    parts = []
    for (where, torch, python), group in sorted(groups.items()):
        runs = [f"{x['transformers']} ({x['passed']:,} passed, {failures_of(x)} failed)" for x in group]
        minor = ".".join(python.split(".")[:2])
        parts.append(f"torch {torch} on {where}, Python {minor}, with transformers {', '.join(runs)}")
    return f"Tested: {'; '.join(parts)}."


def rewrite(text: str, lanes: Mapping[str, Lane]) -> str:
    """``text`` with the line between the two marks renewed.

    Raises:
        ValueError: Unless both marks stand there once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"file must hold {START} and then {END}, once each")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{tested_line(lanes)}\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep the runs that are given, and renew the README's line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="files that pytest --results wrote")
    parser.add_argument("--commit", help="the tree of runs that could not tell, outside git")
    options = parser.parse_args(arguments)
    for run in options.runs:
        lane = json.loads(run.read_text("utf-8"))
        known = options.commit is None or lane["commit"] != "unknown"
        keep(lane if known else {**lane, "commit": options.commit})
    README.write_text(rewrite(README.read_text("utf-8"), read()), "utf-8")
    print(tested_line(read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

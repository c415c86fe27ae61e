"""Fuzz for a while, or for a number of cases: ``make fuzz MINUTES=30``. Failures are shrunk and printed as scripts.

python -m tests.fuzz.fuzz_run calls modules --minutes 30
python -m tests.fuzz.fuzz_run gpu --cases 500 --minutes 9
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

KINDS = {
    "calls": "tests.fuzz.fuzz_calls",
    "modules": "tests.fuzz.fuzz_modules",
    "inductor": "tests.fuzz.fuzz_modules",
    "gpu": "tests.fuzz.fuzz_gpu",
}
#: Simpler cases that are tried for each failure.
TRIES = 40


def main() -> int:
    """Run; the exit status says whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long, all kinds together")
    parser.add_argument("--cases", type=int, default=10**9, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--out", type=Path, help="where the counts go, as JSON")
    options = parser.parse_args()
    os.environ.setdefault("OMNISPARSE_RAISE_BUGS", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts, end = {}, time.monotonic() + 60 * options.minutes
    for left, kind in zip(range(len(options.kinds), 0, -1), options.kinds, strict=True):
        share = time.monotonic() + (end - time.monotonic()) / left
        counts[kind] = run(kind, options.first, options.cases, share)
        print(kind, json.dumps(counts[kind]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
    return int(any(found["bad"] for found in counts.values()))


def run(kind: str, first: int, cases: int, end: float) -> dict[str, Any]:
    """Cases of one kind until ``end``: how many, how many that do not run anywhere, how many with a wrong answer."""
    fuzz: Any = importlib.import_module(KINDS[kind])
    how = {"inner": "inductor"} if kind == "inductor" else {}
    counts: dict[str, Any] = {"cases": 0, "invalid": 0, "bad": 0, "bad_seeds": []}
    for seed in range(first, first + cases):
        if time.monotonic() > end:
            break
        case = fuzz.draw(seed)
        problem = fuzz.problem_of(case, **how)
        if problem is not None and problem.startswith("invalid"):
            counts["invalid"] += 1
            continue
        counts["cases"] += 1
        if problem is not None:
            counts["bad"] += 1
            counts["bad_seeds"].append(seed)
            small, why = shrink(fuzz, case, problem, how)
            print(f"--- {kind}, seed {seed}: {problem}\n# {why}\n{small.script()}\n", flush=True)
    counts["sites"] = dict(getattr(fuzz, "outcomes", {}))
    return counts


def shrink(fuzz: Any, case: Any, problem: str, how: dict[str, str]) -> tuple[Any, str]:
    """A simpler case that fails too, and its problem."""
    tries = 0
    while tries < TRIES:
        for neighbour in getattr(fuzz, "smaller", lambda _: [])(case):
            tries += 1
            found = fuzz.problem_of(neighbour, **how)
            if found is not None and not found.startswith("invalid"):
                case, problem = neighbour, found
                break
            if tries >= TRIES:
                break
        else:
            break
    return case, problem


if __name__ == "__main__":
    raise SystemExit(main())

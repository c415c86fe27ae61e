"""How long a rule's attention would take at the measured shapes: interpolation between measured times, never beyond.

Milliseconds of one layer on the H200, 28/4 heads, D=128, bfloat16, causal, **random data**, all heads' budgets alike.
Blocks (``prefill.json``): the kernel's time by kept share, plus what the estimator's selection took; ``scorers.json``,
where it is there, holds that of the others than ``mean_pool``. A kernel keeping everything is a measured share of 1.
Tokens (``token.json``): near + far by active share and keys share, plus ``select``, measured with ``one_pass``, by
active share. A share outside of what was measured takes the nearest measured one, and the answer says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.rules import Rule

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: The library's names of what the lab writes with options, at blocks of 128.
LIBRARY = {
    "pooled128x128": "mean_pool",
    "pooled32x32": "tile_pool",
    "antidiagonal16": "antidiagonal",
    "probe8": "probe",
}


@dataclasses.dataclass(frozen=True)
class Share:
    """A share that lies outside of what was measured.

    Attributes:
        value: The share.
        taken: The nearest measured one, whose time stands for it.
    """

    value: float
    taken: float

    @property
    def above(self) -> bool:
        """Whether the modelled time is less than the true one."""
        return self.value > self.taken


@dataclasses.dataclass(frozen=True)
class Time:
    """A modelled time of one sparse layer.

    Attributes:
        attention_ms: Of the attention kernels.
        selection_ms: Of the choice; None: not measured for this estimator.
        clipped: By share (``kept``, ``active``, ``keys``): those outside of what was measured.
    """

    attention_ms: float
    selection_ms: float | None
    clipped: dict[str, Share]


def label(rule: Rule) -> str:
    """The rule's estimator in a word, by the library's name where the library has it."""
    options = {key: value for key, value in rule.options.items() if value}  # dims=0: all of them
    name = rule.estimator
    if name == "pooled":
        name += f"{options.get('queries', 1)}x{options.get('keys', 1)}"
    elif name == "one_pass":
        name += f" dims{options['dims']}" if "dims" in options else ""
        name += "" if rule.options.get("bits8", True) else " 16 bits"
    else:
        name += "".join(f"+{key}" if value is True else f"{value}" for key, value in options.items())
    name = LIBRARY.get(name, name) if rule.blocks and rule.unit == 128 else name
    return name if rule.refine is None else f"{name} > exact{rule.refine}"


def interpolate(points: Sequence[tuple[float, float]], share: float) -> tuple[float, Share | None]:
    """Linear between measured ``(share, ms)``; the nearest one beyond them, and then the share that was taken."""
    points = sorted(points)
    inside = min(max(share, points[0][0]), points[-1][0])
    clipped = None if inside == share else Share(share, inside)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= inside <= x1 and x0 < x1:
            part = (inside - x0) / (x1 - x0)
            return (1 - part) * y0 + part * y1, clipped  # exact at both ends
    return points[0][1], clipped


class TimeModel:
    """Times of both granularities at the lengths that were measured.

    Args:
        folder: Where ``prefill.json``, ``token.json`` and perhaps ``scorers.json`` lie.
        kernel: Of the blocks.
    """

    def __init__(self, folder: Path = RESULTS, kernel: str = "flash") -> None:
        self.prefill, self.token = (json.loads((folder / f"{name}.json").read_text()) for name in ("prefill", "token"))
        scorers = folder / "scorers.json"
        self.scorers: list[dict[str, Any]] = json.loads(scorers.read_text())["rows"] if scorers.exists() else []
        self.kernel = kernel

    def dense_ms(self, tokens: int, files: Sequence[str] = ("prefill", "token")) -> float:
        """The fastest dense kernel of these files; they were measured at the same shape, and one lacks a kernel."""
        found: list[dict[str, float]] = []
        if "prefill" in files:
            found.append(self.prefill["dense_ms"][str(tokens)])
        if "token" in files:
            found.append(self.token[str(tokens)]["dense_ms"])
        return min(ms for kernels in found for ms in kernels.values())

    def blocks(self, tokens: int, kept: float, estimator: str) -> Time:
        """A layer at block granularity.

        Args:
            tokens: N.
            kept: Share of the causal pairs.
            estimator: Its ``label``.
        """
        rows = [x for x in self.prefill["rows"] if (x["tokens"], x["kernel"]) == (tokens, self.kernel)]
        points = [(x["kept"], x["attention_ms"]) for x in rows]
        whole = self.prefill.get("full_kernel_ms", {}).get(str(tokens), {}).get(self.kernel)
        attention, clipped = interpolate(points if whole is None else [*points, (1.0, whole)], kept)
        if estimator == "mean_pool":  # hardly depends on the share: what lies beyond the measured is not worth a word
            selection: float | None = interpolate([(x["kept"], x["selection_ms"]) for x in rows], kept)[0]
        else:
            times = [x["selection_ms"] for x in self.scorers if (x["scoring"], x["tokens"]) == (estimator, tokens)]
            selection = times[0] if times else None
        return Time(attention, selection, {"kept": clipped} if clipped else {})

    def tokens(self, tokens: int, active: float, keys: float, estimator: str) -> Time:
        """A layer at token granularity.

        Args:
            tokens: N.
            active: Share of the queries that fetch far keys.
            keys: What they fetch, as a share of N.
            estimator: Its ``label``.
        """
        cases = list(self.token[str(tokens)]["cases"].values())
        levels: dict[float, list[dict[str, float]]] = {}
        for case in cases:
            levels.setdefault(case["active"], []).append(case)
        by_keys = {
            level: interpolate([(c["keys"], c["near"] + c["far"]) for c in row], keys) for level, row in levels.items()
        }
        attention, queries = interpolate([(level, ms) for level, (ms, _) in by_keys.items()], active)
        # The choice depends on the queries alone: at one active share, the mean of its cases.
        choice = [(level, sum(c["select"] for c in row) / len(row)) for level, row in levels.items()]
        found = {"active": queries, "keys": next(iter(by_keys.values()))[1]}
        selection = interpolate(choice, active)[0] if estimator == "one_pass" else None
        return Time(attention, selection, {name: share for name, share in found.items() if share})

"""Budget rules at equal modelled time: everything else the same, which rule costs less perplexity?

With one estimator, and the same queries active, the choice takes the same time under every budget rule; so where it was
not measured, equal attention time is equal total time. Rows whose share of keys or blocks lies above what was measured
have no known place in time: no line goes through them, but a rule that is both faster and better than them is better.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.rules import Rule
from benchmarks.speed_quality.time_model import interpolate, label

#: Estimators as good as the truth; the others are ``"poor"`` here, whatever they cost.
GOOD = ("exact", "one_pass")
BUDGETS = ("flattest_head", "per_head", "fixed")


@dataclasses.dataclass(frozen=True)
class Point:
    """A row of the comparison.

    Attributes:
        time: Share of the fastest dense time, without selection.
        selection: What the selection adds; None: not measured.
        change: Perplexity change in percent.
        at_least: Whether ``time`` is a lower bound, beyond the one that both rules share (their active queries).
        name: Of the row.
    """

    time: float
    selection: float | None
    change: float
    at_least: bool = False
    name: str = ""

    def whole(self) -> Point:
        """The same row with its selection in ``time``."""
        return dataclasses.replace(self, time=self.time + (self.selection or 0.0))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who costs less perplexity at equal time.

    Attributes:
        winner: A budget rule, or None: the rows do not say.
        gap: Percentage points of perplexity that the winner saves.
        how: ``"interpolated"``; ``"faster and better"``: ``gap`` is what it saves in less time still.
        text: For the table.
    """

    winner: str | None
    gap: float
    how: str
    text: str


def budget_of(rule: Rule) -> str:
    """The kind of budget."""
    return rule.budget if isinstance(rule.budget, str) else "fixed"


def granularity(rule: Rule) -> str:
    """``"block"`` or ``"token"``."""
    return "block" if rule.unit > 1 else "token"


def setting(rule: Rule, *, pooled: bool = False) -> str:
    """What two rows must share to be compared: all but name, target and budget; pooled: any estimator as good."""
    family = "good" if pooled and label(rule) in GOOD else label(rule)
    return repr(dataclasses.replace(rule, name="", target=0.0, budget="", estimator=family, options={}))


def compare(one: tuple[str, Sequence[Point]], other: tuple[str, Sequence[Point]]) -> Verdict:
    """Two budget rules by their rows."""
    gaps = []  # (what ``other`` costs more, at which row)
    for (_, line), (_, points), sign in ((one, other, 1.0), (other, one, -1.0)):
        known = [(p.time, p.change) for p in line if not p.at_least]
        for point in points:
            if known and not point.at_least:
                there, outside = interpolate(known, point.time)
                if outside is None:
                    gaps.append((sign * (point.change - there), point))
    if gaps:
        mean = sum(gap for gap, _ in gaps) / len(gaps)
        agree = all(gap * mean > 0 for gap, _ in gaps)
        winner = (one[0] if mean > 0 else other[0]) if agree else None
        where = ", ".join(f"{gap:+.2f} points at time {point.time:.3f}" for gap, point in gaps)
        return Verdict(winner, abs(mean), "interpolated", f"{other[0]} against {one[0]}: {where}")
    said = "every row lies above the measured shares"
    for fast, slow in ((one, other), (other, one)):
        worst = min(slow[1], key=lambda p: p.time)  # its time may be a lower bound: then it is slower still
        faster = [p for p in fast[1] if p.time < worst.time and not p.at_least]
        if faster:
            best, bound = min(faster, key=lambda p: p.change), "at least " if worst.at_least else ""
            gap, spare = worst.change - best.change, worst.time - best.time
            pair = ((fast[0], best), (slow[0], worst))
            said = ", ".join(f"{rule} {point.change:+.2f} % at {point.time:.3f}" for rule, point in pair)
            if gap >= 0:
                text = f"{said}: {bound}{spare:.3f} faster, {gap:.2f} points better"
                return Verdict(fast[0], gap, "faster and better", text)
            said += ": a trade, no row of either at the other's time"
    return Verdict(None, 0.0, "undecided", said)


def verdicts(found: Iterable[tuple[Rule, Point]]) -> list[dict[str, Any]]:
    """Every comparison that the rows allow; good estimators together only where each alone leaves it open.

    Args:
        found: Rows at one length.
    """
    found, results, settled = list(found), [], set()
    for pooled in (False, True):
        groups: dict[str, list[tuple[Rule, Point]]] = {}
        for rule, point in found:
            groups.setdefault(setting(rule, pooled=pooled), []).append((rule, point))
        for key, members in groups.items():
            rules = [r for r, _ in members]
            labels = sorted({label(r) for r in rules})
            if pooled and (len(labels) == 1 or key in settled):
                continue
            if all(point.selection is not None for _, point in members):
                members = [(rule, point.whole()) for rule, point in members]
            for pair in itertools.combinations(BUDGETS, 2):
                sides = [(b, [p for r, p in members if budget_of(r) == b]) for b in pair]
                if all(points for _, points in sides):
                    verdict = compare(sides[0], sides[1])
                    if verdict.winner:
                        settled.add(setting(rules[0], pooled=True))
                    results.append(_entry(rules[0], labels, members, verdict))
    return results


def _entry(rule: Rule, labels: list[str], members: list[tuple[Rule, Point]], verdict: Verdict) -> dict[str, Any]:
    return {
        "granularity": granularity(rule),
        "estimators": labels,
        "scorer": "good" if set(labels) <= set(GOOD) else "poor",
        "heads": rule.gqa,
        "unit": rule.unit,
        "lazy": rule.lazy,
        "selection_included": all(point.selection is not None for _, point in members),
        "rows": [point.name for _, point in members],
        **dataclasses.asdict(verdict),
    }


def missing(rules: Iterable[Rule]) -> list[str]:
    """Budget rules without a single row, by granularity and scorer."""
    have = {(granularity(r), "good" if label(r) in GOOD else "poor", budget_of(r)) for r in rules}
    lines = []
    for kind in ("block", "token"):
        for scorer in ("good", "poor"):
            lacking = [b for b in BUDGETS if (kind, scorer, b) not in have]
            if lacking:
                lines.append(f"{kind}, {scorer} scorer: no row of {', '.join(lacking)}")
    return lines

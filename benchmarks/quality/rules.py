"""One row of the experiment: which estimate, which unit, which budget, which queries."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """A selection rule of the lab; everything beyond the library's config is an ablation.

    Attributes:
        name: Label of the row.
        estimator: A key of ``ESTIMATORS``, or ``"dense"`` for no selection.
        options: Arguments of the estimator.
        refine: Share of the keys that the estimate only shortlists, per segment and head; exact rows within the
            shortlist and the local part then decide. None: the estimate decides.
        segment: Queries that share one choice of keys; 0: the whole sequence.
        unit: Keys chosen together, 1 for tokens. ``unit == segment`` is block granularity: sinks and window are
            then whole blocks and a block of queries is lazy as one.
        target: ``target_recall`` of the estimate.
        budget: ``"flattest_head"``, ``"per_head"`` or a number of tokens.
        lazy: ``lazy_threshold``, None: no query selection.
        lazy_mode: ``"local"`` or ``"skip"``.
        lazy_stride: One lazy query (block) in this many stays active; 0: none.
        gqa: How a group's query heads agree: ``"none"`` (each its own), ``"mean"`` or ``"max"``.
        choice: ``"top"``, or a control with the same budgets: ``"random"``, or ``"recent"`` (the nearest keys).
        rank_by: ``"sum"`` or ``"max"`` over the segment's queries; the budget always comes from the sum.
        sinks: First keys that are always kept.
        window: Last keys that are always kept, the query's own included.
        dense_layers: These layers stay dense.
        dense_tail: The last queries of the sequence see everything.
        share: Neighbouring sparse layers that use one choice, that of the first of them.
    """

    name: str
    estimator: str = "exact"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    refine: float | None = None
    segment: int = 256
    unit: int = 1
    target: float = 0.95
    budget: str | int = "flattest_head"
    lazy: float | None = None
    lazy_mode: str = "local"
    lazy_stride: int = 16
    gqa: str = "none"
    choice: str = "top"
    rank_by: str = "sum"
    sinks: int = 64
    window: int = 256
    dense_layers: tuple[int, ...] = (0, 1)
    dense_tail: int = 0
    share: int = 1

    @property
    def blocks(self) -> bool:
        """Whether queries and keys are chosen as square blocks."""
        return self.unit == self.segment > 1

    @property
    def dense(self) -> bool:
        """Whether nothing is selected."""
        return self.estimator == "dense"

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Rule:
        """A rule from JSON."""
        known = dict(entries)
        known["dense_layers"] = tuple(known.get("dense_layers", (0, 1)))
        return cls(**known)

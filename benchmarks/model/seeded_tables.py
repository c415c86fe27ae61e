"""The seeded demo's figures as tables of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omnisparse_flex.report import table

#: Rows of the closeness table: its name, and the suffix of its figures.
CHOICES = (("OmniSparse", ""), ("random blocks, same budgets", "_random"), ("always-kept keys only", "_always_kept"))
#: Rows of the time table.
RUNS = (("dense, plain SDPA", "dense_plain"), ("dense, compiled", "dense_compiled"), ("sparse", "sparse"))


def closeness(figures: Mapping[str, Any]) -> str:
    """How far each choice of keys is from dense: logits (norm ratio), top-1 tokens, generated tokens."""
    rows = [["keys", "density", "true recall", "relative error", "on the question", "top-1 agreement"]]
    for name, suffix in CHOICES:
        columns = ("density", "true_recall", "rel_error", "rel_error_question", "top1")
        numbers = (figures[column + suffix] for column in columns)
        rows.append([name, *(f"{number:.3f}" for number in numbers)])
    dense, sparse = figures["generated_dense"], figures["generated_sparse"]
    same = sum(a == b for a, b in zip(dense, sparse, strict=True))
    lines = [f"greedy tokens, dense:  {dense}", f"greedy tokens, sparse: {sparse}, {same} of {len(dense)} equal"]
    return "\n".join(["Closeness to dense", *table(rows), *lines])


def times(figures: Mapping[str, Any]) -> str:
    """Time to the first token of each run, and the speed-up over the faster dense one."""
    rows = [["attention", "whole model", "decoder alone"]]
    for name, run in RUNS:
        rows.append([name, *(f"{figures[f'{part}_s_{run}']:.3f} s" for part in ("model", "decoder"))])
    rows.append(["speed-up over the faster dense", *(f"{figures[f'speedup_{p}']:.2f}x" for p in ("model", "decoder"))])
    return "\n".join(["Time to the first token (median, selection included)", *table(rows)])

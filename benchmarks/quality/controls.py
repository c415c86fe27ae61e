"""Controls at equal density: what any selection must beat."""

from __future__ import annotations

import dataclasses

from benchmarks.quality.rules import Rule

#: Layers of the model (SmolLM2-135M).
LAYERS = 30


def random_keys(rule: Rule) -> Rule:
    """The same active queries and budgets, keys at random."""
    return dataclasses.replace(rule, name=f"{rule.name} ~ random", choice="random")


def matched_window(rule: Rule, density: float, tokens: int) -> Rule:
    """Sinks + window only, with the window that gives a whole-model density.

    Args:
        rule: Where name, sinks and dense layers come from.
        density: Share of causal pairs over all layers to reach.
        tokens: N.
    """
    dense = len(rule.dense_layers) / LAYERS
    wanted = (density - dense) / (1 - dense)
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if window_share(rule.sinks, middle, tokens) >= wanted else (middle + 1, high)
    return dataclasses.replace(rule, estimator="exact", unit=1, segment=256, budget=0, lazy=None, window=low)


def window_share(sinks: int, window: int, tokens: int) -> float:
    """Share of the causal pairs that lie on the sinks or in the window."""
    kept = sum(min(q + 1, window + min(sinks, max(0, q + 1 - window))) for q in range(tokens))
    return kept / (tokens * (tokens + 1) // 2)

"""What an estimate costs, as a share of the FLOPs of one dense causal attention.

Dense: 4 D per query head and causal pair (q·k, then p·v). A pass over all pairs of q·k is 0.5 of that; exact column
mass takes two (one for the row's log-sum-exp, one for the columns). FLOPs only: the exponentials, which bind a narrow
pass in practice, are not in it, so times must be measured before anything is claimed.
"""

from __future__ import annotations

from benchmarks.quality.one_pass import LEADER
from benchmarks.quality.rules import Rule

#: Passes over the pairs for one column mass, at half the dense FLOPs each.
PASSES = 2 * 0.5
#: Tensor-core throughput relative to 16-bit.
SPEED = {"fp8": 2.0, "int4": 4.0}


def selection_cost(rule: Rule, tokens: int, head_dim: int, groups: int, active: float) -> float:
    """FLOPs of the estimate relative to dense attention in one layer.

    Args:
        rule: The row.
        tokens: N.
        head_dim: D.
        groups: Query heads per KV head: clusters are made once per KV head.
        active: Share of active queries: shortlists are refined, and the one pass may be made, for those only.
    """
    if rule.dense or rule.budget == 0 or rule.choice != "top":  # a control pays for nothing
        return 0.0
    coarse = _estimate(rule, tokens, head_dim, groups, active)
    return coarse if rule.refine is None else coarse + PASSES * active * rule.refine


def _estimate(rule: Rule, tokens: int, head_dim: int, groups: int, active: float) -> float:
    options = rule.options
    if rule.estimator in SPEED:
        return PASSES / SPEED[rule.estimator]
    if rule.estimator == "pca":
        return PASSES * options["dims"] / head_dim
    if rule.estimator == "pooled":
        return PASSES / (options.get("queries", 1) * options.get("keys", 1))
    if rule.estimator == "antidiagonal":
        return PASSES / options["stride"]
    if rule.estimator == "probe":
        return PASSES / options["every"]
    if rule.estimator == "one_pass":
        # For all queries where the pass itself tells who is active.
        narrow = (options.get("dims") or head_dim) / head_dim / (SPEED["fp8"] if options.get("bits8", True) else 1)
        guess = (2 if options.get("scatter") else 1) / options.get("pool", 16)
        if options.get("leaders"):
            # Leaders' scores and guesses, and all queries over the keys that these look at: not more than there are.
            looked = 2 * options["leaders"] / tokens
            return 0.5 * (narrow * (active + 1 / LEADER) + guess / LEADER + looked)
        led = 1 / LEADER if options.get("level") else 0.0
        rest = 1 / options["pool"] if options.get("rest") else 0.0
        return 0.5 * (narrow * ((active if options.get("early") else 1.0) + led) + guess + rest)
    if rule.estimator == "clustered":
        # q·centre is not causal: twice the pairs. One pass: its rows are short enough to be kept.
        score = 2 * 0.5 / options["size"] * (2 if options.get("spread") else 1)
        return score + 2 * 0.5 / options["size"] * options.get("rounds", 3) / groups
    return PASSES

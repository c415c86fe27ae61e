"""How many more keys a head needs, the budget shared by all heads, and each head's own choice."""

from __future__ import annotations

import torch
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.sort_rows)


def rank(mass: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row's eligible units by mass, descending.

    Args:
        mass: float32 (..., NK).
        eligible: bool, broadcastable to ``mass``; the others go last with mass 0.

    Returns:
        ``(sorted_mass, order)``, both (..., NK).
    """
    values, order = torch.ops.omnisparse.sort_rows(mass.masked_fill(~eligible, -1.0))
    return values.clamp(min=0.0), order


def need(sorted_mass: Tensor, kept_mass: Tensor, eligible_count: Tensor, target: Tensor | float) -> Tensor:
    """Fewest additional units per row with kept mass + theirs >= ``target`` of the allowed mass.

    Args:
        sorted_mass: float32 (..., NK), descending, 0 for units that are not eligible.
        kept_mass: float32 (...), mass of the always-kept units.
        eligible_count: int (...), number of eligible units.
        target: Share of the row's mass to keep, a number or 0-d tensor; from 1 on, all.

    Returns:
        int64 (...).

    Source: PAPER "KV selection". Our choice: a target of 1 or more keeps everything as a
    rule, because a float32 running sum does not reliably reach 1.
    """
    total = kept_mass + sorted_mass.sum(-1)
    reached = kept_mass.unsqueeze(-1) + sorted_mass.cumsum(-1)
    wanted = (target * total).unsqueeze(-1)
    additional = (reached < wanted).sum(-1) + 1
    additional = additional.masked_fill(kept_mass >= wanted.squeeze(-1), 0)
    goal = torch.as_tensor(target, dtype=torch.float32, device=sorted_mass.device)
    return torch.where(goal >= 1.0, eligible_count, torch.minimum(additional, eligible_count))


def shared_budget(needs: Tensor, active: Tensor, rule: str | int) -> Tensor:
    """The budget of each head and row from all heads' needs.

    Args:
        needs: int64 (B, H, R).
        active: bool (B, H, R); a lazy row asks for nothing and gets nothing.
        rule: ``"flattest_head"``, ``"per_head"`` or a fixed number of units.

    Returns:
        int64 (B, H, R).

    Source: PAPER: k* = max_h need(h), applied uniformly; each head still picks its own keys.
    """
    budget = needs.masked_fill(~active, 0)
    if rule == "flattest_head":
        budget = budget.amax(dim=1, keepdim=True).expand_as(budget)
    elif not isinstance(rule, str):
        budget = torch.full_like(budget, rule)
    return budget.masked_fill(~active, 0)


def keep_top(order: Tensor, eligible: Tensor, budget: Tensor) -> Tensor:
    """Each row's ``budget`` best eligible units, as a bool map of ``order``'s shape."""
    places = torch.arange(order.shape[-1], device=order.device)
    chosen = places < budget.unsqueeze(-1)
    return torch.zeros_like(chosen).scatter(-1, order, chosen) & eligible

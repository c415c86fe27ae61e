"""A control: random blocks at the budgets of a selection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from omnisparse_flex.masks.blocks import budget as budgets
from omnisparse_flex.masks.blocks import select

#: Added to a layer's target recall, it asks for the random control; see ``random_switch``.
RANDOM = 2.0


@contextlib.contextmanager
def random_switch(seed: int = 0) -> Iterator[None]:
    """Control: graphs that compile in this context choose random blocks where the target says so.

    A target raised by ``RANDOM`` leaves the estimator, the budgets, the always-kept blocks and
    the active rows what they are; only which eligible blocks a row spends its budget on is
    drawn at random. One graph serves both, so that the control costs no compile of its own.

    Args:
        seed: Of the draw, which is a fixed function of (head, row, column).
    """
    switches: list[Tensor] = []

    def need(sorted_mass: Tensor, kept_mass: Tensor, eligible_count: Tensor, target: Tensor | float) -> Tensor:
        asked = torch.as_tensor(target, dtype=torch.float32, device=sorted_mass.device)
        switches.append(asked > RANDOM - 0.5)
        real = torch.where(switches[-1], asked - RANDOM, asked)
        return budgets.need(sorted_mass, kept_mass, eligible_count, real)

    def keep_top(order: Tensor, eligible: Tensor, budget: Tensor) -> Tensor:
        drawn = budgets.rank(_noise(order, seed), eligible)[1]
        return budgets.keep_top(torch.where(switches.pop(), drawn, order), eligible, budget)

    select.need, select.keep_top = need, keep_top  # type: ignore[attr-defined]
    try:
        yield
    finally:
        select.need, select.keep_top = budgets.need, budgets.keep_top  # type: ignore[attr-defined]


def _noise(like: Tensor, seed: int) -> Tensor:
    """Values in (0, 1) by position; (B, H, NQ, NK). A hash: random operators do not trace into every graph."""
    _, heads, rows, columns = like.shape
    h = torch.arange(heads, device=like.device).view(-1, 1, 1)
    q = torch.arange(rows, device=like.device).view(-1, 1)
    kv = torch.arange(columns, device=like.device)
    state = (h * 7919 + q * 104729 + kv * 1299709 + seed * 15485863 + 12345) % 2147483647
    for _ in range(3):  # a Lehmer generator's step; int64 holds its product
        state = (state * 48271 + 11) % 2147483647
        state = state ^ (state >> 15)
    return ((state % 2147483647).to(torch.float32) + 1).div(2147483649.0).expand_as(like)

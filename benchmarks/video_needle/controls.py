"""What a selection must beat: sinks and window alone, and random blocks, both at the density of the selection.

Both are scorers that know nothing of queries and keys, put in the place of the real one. Their density
follows from the target recall, which is an input of the compiled graph: one graph serves every density.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from omnisparse_flex.attention import select_op
from omnisparse_flex.errors import require
from omnisparse_flex.masks.blocks import select


def random_blocks(query: Tensor, key: Tensor, some: Tensor, *, scale: float, block: int, **_: Any) -> Tensor:
    """A hash of batch row, head, query block and key block as the mass; a ``Scorer``."""
    places = _places(query, key, some)
    mixed = sum(x * factor for x, factor in zip(places, (17.13, 5.717, 12.9898, 78.233), strict=True))
    return _normalised(1 + (torch.sin(mixed) * 43758.5453).frac().abs(), some)


def latest_blocks(query: Tensor, key: Tensor, some: Tensor, *, scale: float, block: int, **_: Any) -> Tensor:
    """Nearly equal mass, a little more for later blocks: the budget then widens the window and nothing else."""
    places = _places(query, key, some)
    later = 1 + places[3] / (4 * some.shape[-1]) + 0 * sum(places[:3])
    return _normalised(later, some)


SCORERS = {"window only": latest_blocks, "random": random_blocks}


def _places(query: Tensor, key: Tensor, some: Tensor) -> list[Tensor]:
    """Index of batch row, query head, query block and key block, each ready to be broadcast."""
    shape = (query.shape[0], query.shape[1], some.shape[-2], some.shape[-1])
    return [
        torch.arange(n, device=key.device, dtype=torch.float32).view(*(-1 if i == axis else 1 for i in range(4)))
        for axis, n in enumerate(shape)
    ]


def _normalised(mass: Tensor, some: Tensor) -> Tensor:
    mass = mass.masked_fill(~some, 0.0)
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-6)


@contextlib.contextmanager
def scoring(name: str | None) -> Iterator[None]:
    """While open, whatever runs or is compiled scores blocks by the control ``name``; None changes nothing.

    AOTAutograd's cache knows our functions by names that spell the rules, not the scorer behind them: it would
    hand one control the graph of the other, so it stays closed.

    Raises:
        ConfigError: On an unknown control.
    """
    if name is None:
        yield
        return
    require(name in SCORERS, "control", f"be one of {', '.join(SCORERS)}", name)
    known = select.SCORERS["mean_pool"]
    select.SCORERS["mean_pool"] = SCORERS[name]
    select_op.compiled.cache_clear()
    try:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        select.SCORERS["mean_pool"] = known
        select_op.compiled.cache_clear()


def match_density(density_at: Callable[[float], float], wanted: float, tries: int = 8) -> float:
    """The target recall at which a control keeps at least ``wanted``, as little more as can be found.

    Args:
        density_at: Density of a control under a target recall; grows with it.
        wanted: Density of the selection that is controlled.
        tries: Halvings of the interval.

    Returns:
        A target recall in (0, 1).
    """
    low, high = 0.001, 0.999
    for _ in range(tries):
        middle = (low + high) / 2
        low, high = (low, middle) if density_at(middle) >= wanted else (middle, high)
    return high

"""Coefficients of the cost model from measured prefills."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from omnisparse_flex.cost_model import Costs, Shape, causal_pairs, sparse_terms


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One measured causal prefill.

    Attributes:
        tokens: N.
        shape: Its heads.
        share: Kept pairs over causal pairs.
        ours: Milliseconds, selection included.
        dense: Milliseconds of the fastest dense kernel.
    """

    tokens: int
    shape: Shape
    share: float
    ours: float
    dense: float


def fit(samples: Sequence[Sample]) -> Costs:
    """Least squares over relative errors, every coefficient at least 0.

    Args:
        samples: At several lengths, and at least two shares or many lengths.

    Raises:
        ValueError: With fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError(f"at least three samples are needed, got {len(samples)}")
    dense = _solve([(causal_pairs(s.tokens, s.shape), 1.0) for s in samples], [s.dense for s in samples])
    ours = _solve([sparse_terms(s.tokens, s.shape, s.share) for s in samples], [s.ours for s in samples])
    sparse, token, block, call = ours
    return Costs(dense[0], dense[1], sparse, token, block, call, shortest=min(s.tokens for s in samples))


def _solve(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Non-negative least squares over relative errors: terms that come out negative are left out."""
    matrix, goal = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    matrix = matrix / goal[:, None]
    size = matrix.abs().amax(0)
    used = list(range(matrix.shape[1]))
    while True:
        part: Tensor = matrix[:, used] / size[used]
        found = torch.linalg.lstsq(part, torch.ones_like(goal)[:, None], driver="gelsd").solution[:, 0]
        if (found >= 0).all():
            break
        used.remove(used[int(found.argmin())])
    result = [0.0] * matrix.shape[1]
    for place, value in zip(used, (found / size[used]).tolist(), strict=True):
        result[place] = value
    return result

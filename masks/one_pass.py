"""The one-pass estimator: column mass whose normalisers are guessed before the pass, not found by another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.column_mass import column_mass
from omnisparse_flex.masks.loudest import take_columns
from omnisparse_flex.types import MaskMod, ScoreMod


def one_pass(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    rows: Tensor,
    row_count: Tensor,
    config: OmniSparseConfig,
    *,
    block: int,
    scale: float,
    pairs: MaskMod | None,
    score: ScoreMod | None,
    first: int = 0,
    far: Tensor,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax mass that the active rows of each segment give to each key, one exponential a pair and no second pass.

    A row's normaliser only weighs it against the other rows of its segment, and budgets follow
    from ratios. So a guess does: the log-sum-exp of the always-kept keys, which part 1 of the
    token path has anyway, joined with a lower bound of that of the eligible keys. As the guess is never above the
    truth, a weight is cut at 1, which it truly never exceeds.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        near_lse: float32 (B, Hq, L).
        eligible: bool (B or 1, Hkv or 1, M, NK).
        rows: int64 (B, Hkv, M, R), active first.
        row_count: int64 (B, Hkv, M).
        config: Rules.
        block: Tokens per block.
        scale: Logit scale.
        pairs: The model's own mask; None: it allows every pair of an eligible block.
        score: The model's own change of the logits, or None.
        first: Index of the first segment: the queries are those from there on.
        far: float32 (B, Hq, L), the bound: ``leaders.looked_at_lse``, or for the leaders ``pooled_lse``.
        columns: int64 (B, Hkv, dims), the coordinates that the pass multiplies; None: all.

    Returns:
        As ``column_mass``: float32 (B, Hkv, M, S) and (B, Hkv, M) that together sum to 1, or to 0
        for a segment without rows that see a key.

    Source: PAPER "Scores". Our choice: measured on real weights against exact mass
    (``benchmarks/quality``, rows "one-pass"); on CUDA the products are float8 (``estimate_kernel``).
    """
    rules: dict[str, Any] = {"block": block, "scale": scale, "score": score, "first": first}
    guess = torch.logaddexp(near_lse.to(far.dtype), far)
    if columns is not None:
        query, key = (take_columns(x, columns) for x in (query, key))
    return column_mass(query, key, near_lse, eligible, rows, row_count, config, pairs=pairs, guess=guess, **rules)


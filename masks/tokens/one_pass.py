"""The one-pass estimator: column mass whose normalisers are guessed before the pass, not found by another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.tokens.column_mass import column_mass
from omnisparse_flex.masks.tokens.head_dims import gather_dims
from omnisparse_flex.masks.tokens.pooled_lse import pooled_lse
from omnisparse_flex.types import MaskMod, ScoreMod

#: Keys to a mean in the guess. 16 were measured equally good: +1.00 % perplexity against +0.99 %, SmolLM2 at one target
#: (``benchmarks/results/quality_smollm2_fourth.json``, rows "one-pass ... pool16" and "pool32").
GUESS_POOL = 32


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
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax mass that the active rows of each segment give to each key, one exponential a pair and no second pass.

    A row's normaliser only weighs it against the other rows of its segment, and budgets follow
    from ratios. So a guess does: the log-sum-exp of the always-kept keys, which part 1 of the
    token path has anyway, joined with that of the means of ``GUESS_POOL`` eligible keys.
    By convexity the guess is never above the truth; a weight is cut at 1, which it truly never exceeds.

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
        columns: int64 (B, Hkv, dims), the coordinates that the pass multiplies; None: all. The guess takes all.

    Returns:
        As ``column_mass``: float32 (B, Hkv, M, S) and (B, Hkv, M) that together sum to 1, or to 0
        for a segment without rows that see a key.

    Source: PAPER "Scores". Our choice: measured on real weights against exact mass
    (``benchmarks/quality``, rows "one-pass"); on CUDA the products are float8 (``kernels.column_mass``).
    """
    rules: dict[str, Any] = {"block": block, "scale": scale, "score": score, "first": first}
    guess = guessed_lse(query, key, near_lse, eligible, config.segment_size, **rules)
    if columns is not None:
        query, key = (gather_dims(x, columns) for x in (query, key))
    return column_mass(query, key, near_lse, eligible, rows, row_count, config, pairs=pairs, guess=guess, **rules)


def guessed_lse(
    query: Tensor,
    key: Tensor,
    near_lse: Tensor,
    eligible: Tensor,
    segment: int,
    *,
    block: int,
    scale: float,
    score: ScoreMod | None,
    first: int = 0,
) -> Tensor:
    """The guess, (B, Hq, L); keys that are not finite have no part in it."""
    whole = torch.where(key.isfinite().all(-1, keepdim=True), key, 0.0)
    rules: dict[str, Any] = {"block": block, "pool": GUESS_POOL, "scale": scale, "score": score, "first": first}
    far = pooled_lse(query, whole, eligible, segment, **rules)
    return torch.logaddexp(near_lse.to(far.dtype), far)

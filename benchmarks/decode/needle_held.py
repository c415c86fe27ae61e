"""Which words of a fact a slimmed cache still holds when ``needle_decode.py`` asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def words_in(context: Tensor, answer: Tensor) -> Tensor:
    """Where the words of an answer stand in its context, every time that they are said.

    Args:
        context: int64 (B, S).
        answer: int64 (B, W), one word after the other.

    Returns:
        bool (B, S).
    """
    width = answer.shape[1]
    starts = (context.unfold(1, width, 1) == answer[:, None]).all(2)
    found = torch.zeros_like(context, dtype=torch.bool)
    for i in range(width):
        found[:, i : i + starts.shape[1]] |= starts
    return found


def held_share(layers: Any, places: Tensor) -> Tensor:
    """Share of some tokens that each head still has on the device.

    Args:
        layers: Of an ``OmniSparseCache``.
        places: bool (B, S), the tokens; at least one in each row.

    Returns:
        float32 (B, layers, Hkv).
    """
    shares = []
    for layer in layers:
        parts = [(head, part, column) for part in layer.kept for column, head in enumerate(part.heads)]
        kept = [_kept(part.positions[:, column], layer.prefix) for _, part, column in sorted(parts, key=lambda x: x[0])]
        marked = places.to(kept[0].device)
        shares.append(torch.stack([(x[:, : marked.shape[1]] & marked).sum(1) / marked.sum(1) for x in kept], 1))
    return torch.stack(shares, 1).float().cpu()


def _kept(positions: Tensor, length: int) -> Tensor:
    """bool (B, length); a position of ``length`` stands for no token."""
    kept = torch.zeros(positions.shape[0], length + 1, dtype=torch.bool, device=positions.device)
    return kept.scatter_(1, positions.long(), True)[:, :-1]


def summary_of(shares: Tensor, right: Tensor) -> dict[str, Any]:
    """Both facts' words in numbers.

    Args:
        shares: float32 (C, 2, layers, Hkv), as ``held_share`` says it of each question's fact.
        right: bool (C,), whether the second question was answered right.

    Returns:
        Mean shares held of the first and the second fact; of the second where it was answered right and
        wrong; by layer; and the share of heads that hold all of it.
    """
    second = shares[:, 1].flatten(1)
    by_answer = {
        name: rows.mean().item() for name, rows in (("right", second[right]), ("wrong", second[~right])) if len(rows)
    }
    return {
        "first_fact": shares[:, 0].mean().item(),
        "second_fact": second.mean().item(),
        "second_fact_if": by_answer,
        "second_fact_by_layer": shares[:, 1].mean((0, 2)).tolist(),
        "heads_with_all_of_it": (second == 1).float().mean().item(),
    }

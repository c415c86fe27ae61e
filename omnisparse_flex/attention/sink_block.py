"""Logit sinks as keys of a flex call: for kernels that return no log-sum-exp (Inductor's on the CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)


class SinkBlock(NamedTuple):
    """Operands of a flex call whose first block of keys holds the sinks, for kernels without a log-sum-exp.

    Attributes:
        key: (B, Hkv, block + S, D).
        value: (B, Hkv, block + S, Dv), 0 at the sink.
        keep: bool (B or 1, Hq or 1, NQ, 1 + NK).
        full: The same for blocks without a mask.
        mask_mod: Over the longer keys; its trailing arguments are those of the given one.
        score_mod: The same, with the sinks as one more trailing argument.
    """

    key: Tensor
    value: Tensor
    keep: Tensor
    full: Tensor
    mask_mod: Callable[..., Tensor]
    score_mod: Callable[..., Tensor]


def with_sink_block(
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    full: Tensor,
    mask_mod: Callable[..., Tensor],
    score_mod: Callable[..., Tensor],
    block: int,
) -> SinkBlock:
    """Put one block of keys in front, of which the first is every head's sink and the others are nobody's.

    Args:
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        keep: bool (B or 1, Hq or 1, NQ, NK).
        full: bool, broadcastable to ``keep``.
        mask_mod: ``(b, h, q, kv, *mask_buffers) -> bool``.
        score_mod: ``(score, b, h, q, kv, *score_buffers) -> score``.
        block: Keys of a block.
    """

    def mask_with_sink(b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        own = mask_mod(b, h, q, torch.where(kv < block, 0, kv - block), *buffers)
        return (kv == 0) | ((kv >= block) & own)

    def score_with_sink(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        *others, sinks = buffers
        own = score_mod(score, b, h, q, torch.where(kv < block, 0, kv - block), *others)
        return torch.where(kv < block, sinks[h].to(own.dtype), own)

    # Realized: Inductor fails to bound what computes the maps once a concatenation has shifted its index.
    keep, full = (torch.ops.omnisparse.realize(x) for x in (keep, full))
    key, value = (F.pad(x, (0, 0, block, 0)) for x in (key, value))
    keep, full = F.pad(keep, (1, 0), value=True), F.pad(full, (1, 0), value=False)
    return SinkBlock(key, value, keep, full, mask_with_sink, score_with_sink)

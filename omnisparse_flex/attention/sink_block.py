"""Logit sinks as keys of a flex call: for kernels that return no log-sum-exp (Inductor's on the CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines torch.ops.omnisparse.realize)
from omnisparse_flex.masks.blocks.select import BLOCK


class SinkBlock(NamedTuple):
    """Operands of a flex call whose first block of keys holds the sinks, for kernels without a log-sum-exp.

    Attributes:
        key: (Z, 1, BLOCK + S, D).
        value: (Z, 1, BLOCK + S, Dv), 0 at the sink.
        keep: bool (Z, 1, NQ, 1 + NK).
        full: bool (Z, 1, NQ, 1 + NK).
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
    *,
    kv_heads: int,
    groups: int,
) -> SinkBlock:
    """Put one block of keys in front, of which the first is every head's sink and the others are nobody's.

    Args:
        key: (Z, 1, S, D); Z is batch times KV heads.
        value: (Z, 1, S, Dv).
        keep: bool (Z, 1, NQ, NK).
        full: bool (Z, 1, NQ, NK).
        mask_mod: ``(z, g, q, kv, *mask_buffers) -> bool``.
        score_mod: ``(score, z, g, q, kv, *score_buffers) -> score``.
        kv_heads: KV heads in Z.
        groups: Query heads of a KV head.
    """

    def mask_with_sink(z: Tensor, g: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        own = mask_mod(z, g, q, torch.where(kv < BLOCK, 0, kv - BLOCK), *buffers)
        return (kv == 0) | ((kv >= BLOCK) & own)

    def score_with_sink(score: Tensor, z: Tensor, g: Tensor, q: Tensor, kv: Tensor, *buffers: Tensor) -> Tensor:
        *others, sinks = buffers
        own = score_mod(score, z, g, q, torch.where(kv < BLOCK, 0, kv - BLOCK), *others)
        return torch.where(kv < BLOCK, sinks[(z % kv_heads) * groups + g].to(own.dtype), own)

    # Realized: Inductor fails to bound what computes the maps once a concatenation has shifted its index.
    keep, full = (torch.ops.omnisparse.realize(x) for x in (keep, full))
    key, value = (F.pad(x, (0, 0, BLOCK, 0)) for x in (key, value))
    keep, full = F.pad(keep, (1, 0), value=True), F.pad(full, (1, 0), value=False)
    return SinkBlock(key, value, keep, full, mask_with_sink, score_with_sink)

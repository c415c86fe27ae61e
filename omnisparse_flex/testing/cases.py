"""What the strategies draw: sizes of an attention call, and masks in their two forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omnisparse_flex.types import MaskMod


class AttentionShape(NamedTuple):
    """Sizes of one attention call; lengths in tokens."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def heads(self) -> int:
        """Query heads: ``kv_heads * group``."""
        return self.kv_heads * self.group

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Normal query ``(B, Hq, L, D)``, key and value ``(B, Hkv, S, D)`` on the CPU, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        query_shape = (self.batch, self.heads, self.q_len, self.head_dim)
        kv_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        query, key, value = (
            torch.randn(shape, generator=generator).to(dtype) for shape in (query_shape, kv_shape, kv_shape)
        )
        return query, key, value


class MaskCase(NamedTuple):
    """A mask in its two forms: ``mask_mod``, and ``dense`` as ``(B, 1, L, S)`` bool made without it."""

    name: str
    mask_mod: MaskMod
    dense: Tensor

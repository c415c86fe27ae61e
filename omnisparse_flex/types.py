"""Type aliases in FlexAttention's own vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

#: ``(b, h, q_idx, kv_idx) -> bool tensor``; indices are broadcastable int tensors.
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: ``(score, b, h, q_idx, kv_idx) -> score``; a pointwise change of one attention logit.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

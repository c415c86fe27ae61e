"""Types of several folders: FlexAttention's functions, and the tensors of a call's run-time state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

#: ``(b, h, q_idx, kv_idx) -> bool tensor``; indices are broadcastable int tensors.
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: ``(score, b, h, q_idx, kv_idx) -> score``; a pointwise change of one attention logit.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

Operand = TypeVar("Operand")


class StateTensors(NamedTuple, Generic[Operand]):
    """What compiled graphs read beside a module's own inputs: tensors, or the nodes that stand for them in a graph.

    The order is that of the operators ``omnisparse::attn`` and ``omnisparse::bind``.

    Attributes:
        visual: bool (B, S), tokens eligible for selection, or None: all.
        recall: float32 (layers,), target recall of each layer.
        stats: float32 (layers, len(STATS)) to be written, or None.
        maps: uint8 (layers, H, rows, columns) to be painted, or None.
        recalls: float32 (layers, 2, Hq) for mean and minimum true recall, or None.
        promises: float32 (layers, len(RECORD)), what each layer kept of what it promised, or None.
    """

    visual: Operand | None = None
    recall: Operand | None = None
    stats: Operand | None = None
    maps: Operand | None = None
    recalls: Operand | None = None
    promises: Operand | None = None

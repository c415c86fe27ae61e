"""What a call kept of its sampled rows' attention, against what was promised: the numbers that are always recorded."""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns of the record of a layer: true recall of the last call, mean and worst head; and from ``COUNTED_FROM`` on how
#: many calls there were, and how many of them kept less than promised.
RECORD = ("mean", "worst_head", "calls", "broken")
COUNTED_FROM = 2
#: A recall that much under its target is rounding.
ROUNDING = 1e-3


@torch.no_grad()
def one_call(recall: Tensor, some: Tensor, target: Tensor | float) -> Tensor:
    """The record of one call of a layer.

    Args:
        recall: float32 (B, Hq, NQ), true recall of a sampled row of each query block.
        some: bool (B or 1, Hq or 1, NQ, NK), blocks with possibly allowed pairs.
        target: The recall that the call promised, a number or 0-d tensor.

    Returns:
        float32 (len(RECORD),). A call breaks its promise if a head's rows keep less than it on average; query blocks
        that see no key do not count. Nothing here waits for the device.
    """
    sees = some.any(-1).expand_as(recall)
    number = sees.sum((0, 2))
    kept = torch.where(sees, recall, 0.0).sum((0, 2))
    worst = torch.where(number > 0, kept / number.clamp(min=1), 1.0).amin()
    mean = kept.sum() / number.sum().clamp(min=1)
    return torch.stack((mean, worst, torch.ones_like(mean), (worst < target - ROUNDING).to(torch.float32)))

"""Mixed-modal attention: bidirectional inside a run of visual tokens, causal elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omnisparse_flex.masks._checks import check_bool_map
from omnisparse_flex.types import MaskMod


def visual_text(visual: Tensor) -> MaskMod:
    """A query sees every earlier key; a visual query also the whole visual span it lies in.

    Args:
        visual: ``(B, N)`` bool, True at visual tokens. On the queries' device.

    Returns:
        A ``mask_mod``. Without a visual token it is ``causal()``.

    Raises:
        ConfigError: If ``visual`` is not a 2-D bool tensor.

    Source: Transfusion, arXiv 2408.11039, section 3 (attention inside an image). Our
    choice: a span is a maximal run of visual tokens, so two images, or two frames,
    without a text token between them are one span.
    """
    check_bool_map("visual", visual, "(B, N)")
    starts = visual & ~F.pad(visual[:, :-1], (1, 0))
    # 0 at text, k inside the k-th span: two tokens share a span iff their numbers are equal and not 0.
    span = torch.where(visual, starts.cumsum(dim=-1, dtype=torch.int32), 0)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = span[b, q_idx]
        return (kv_idx <= q_idx) | ((own == span[b, kv_idx]) & (own > 0))

    mask_mod.__name__ = "visual_text"
    return mask_mod

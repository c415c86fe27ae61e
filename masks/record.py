"""What a selection leaves behind for ``collect_stats``: a row of numbers and a picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omnisparse_flex.masks.opaque import OpaqueMask
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.select import BLOCK, BlockSelection

#: Columns of the statistics tensor, in order; shares are 0-1.
STATS = (
    "kept_blocks",
    "allowed_blocks",
    "budget",
    "active_share",
    "discarded_share",
    "flattest_head",
    "estimated_recall",
    "worst_estimated_recall",
    "overflow_rows",
)
#: Values of a picture's cells.
EMPTY, SELECTED, FORCED = 0, 1, 2


@torch.no_grad()
def selection_stats(selection: BlockSelection) -> Tensor:
    """One float32 value per entry of ``STATS``.

    ``kept_blocks`` and ``allowed_blocks`` are means over batch and heads of the number of
    block pairs; ``budget`` is the mean number of blocks beyond the always-kept ones of an
    active row; ``discarded_share`` is that of the lazy rows; the recall is the estimator's
    own (uncalibrated).
    """
    batch, heads = selection.keep.shape[:2]
    rows = selection.layout.some.any(-1).expand(batch, heads, -1)
    active = selection.active & rows
    lazy = selection.lazy & rows
    recall = (selection.mass * selection.keep).sum(-1)
    values = (
        selection.keep.sum() / (batch * heads),
        selection.layout.some.expand_as(selection.keep).sum() / (batch * heads),
        (selection.budget * active).sum() / active.sum().clamp(min=1),
        active.sum() / rows.sum().clamp(min=1),
        (lazy & ~selection.active).sum() / lazy.sum().clamp(min=1),
        (selection.needs * active).sum((0, 2)).argmax(),
        (recall * rows).sum() / rows.sum().clamp(min=1),
        torch.where(rows, recall, 1.0).amin(),
        selection.overflow.sum(),
    )
    return torch.stack([value.to(torch.float32) for value in values])


@torch.no_grad()
def record_maps(canvas: Tensor, selection: BlockSelection) -> None:
    """Paint the first batch row's kept blocks: ``canvas`` is uint8 (H, rows, columns), cropped to fit."""
    _, heads, rows, columns = selection.keep.shape
    cells = selection.keep[0].to(torch.uint8) * SELECTED
    cells = torch.where(selection.layout.forced[0].expand_as(cells.bool()), FORCED, cells).to(torch.uint8)
    canvas[:heads, :rows, :columns].copy_(cells[: canvas.shape[0], : canvas.shape[1], : canvas.shape[2]])


#: Query rows whose true attention is computed for ``true_recall``.
SAMPLED_ROWS = 32


@torch.no_grad()
def true_recall(
    selection: BlockSelection,
    query: Tensor,
    key: Tensor,
    mask: MaskProgram | OpaqueMask,
    scale: float,
    score: Callable[..., Tensor] | None,
) -> Tensor:
    """Softmax mass that the selection really keeps, from evenly sampled exact rows.

    Args:
        selection: What was kept.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        mask: The model's own mask.
        scale: Logit scale.
        score: ``(logits, b, h, q, kv) -> logits``, the model's own change, or None.

    Returns:
        float32 (2, Hq): mean and minimum over batch and sampled rows that see any key.
    """
    batch, heads, q_len, _ = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    steps = torch.arange(SAMPLED_ROWS, device=query.device)
    rows = torch.ops.omnisparse.realize(((steps + 1) * q_len // SAMPLED_ROWS - 1).clamp(min=0))
    b = torch.arange(batch, device=query.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=query.device).view(1, -1, 1, 1)
    q, kv = rows.view(1, 1, -1, 1), torch.arange(kv_len, device=query.device).view(1, 1, 1, -1)
    sampled = query.index_select(2, rows).unflatten(1, (-1, groups))
    logits = (sampled @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).float() * scale
    if score is not None:
        logits = score(logits, b, h, q, kv)
    allowed = mask.pairs(b, h, q, kv).to(torch.bool).expand(batch, heads, -1, kv_len)
    mass = torch.softmax(logits.masked_fill(~allowed, float("-inf")), -1).masked_fill(~allowed, 0.0)
    # Realized in between: Inductor cannot bound an index into an index.
    kept = torch.ops.omnisparse.realize(selection.keep.index_select(2, rows // BLOCK))
    kept = kept.index_select(3, kv.view(-1) // BLOCK)
    recall = (mass * kept.repeat_interleave(groups, 1)).sum(-1)
    sees = allowed.any(-1)
    mean = (recall * sees).sum((0, 2)) / sees.sum((0, 2)).clamp(min=1)
    return torch.stack([mean, torch.where(sees, recall, 1.0).amin((0, 2))])

"""The whole of ZipAR's parallel decoding as one masked forward: exact likelihoods, and training under its windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.errors import require
from omnisparse_flex.grid.attention_mask import attention_of, in_form
from omnisparse_flex.grid.request import check_grid
from omnisparse_flex.masks.combine import intersect, union
from omnisparse_flex.masks.padding import padding
from omnisparse_flex.masks.zipar import row_starts, zipar
from omnisparse_flex.types import MaskMod

REDUCTIONS = ("mean", "none")


def zipar_logits(
    model: Any,
    input_ids: Tensor,
    grid: Sequence[int],
    window: int | Tensor,
    *,
    eol: bool,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The logits from which ``zipar_generate`` draws each token of a given image.

    Args:
        model: A causal LM of transformers.
        input_ids: int64 ``(B, N)``: the prompt, padded on the left, and the whole grid in raster order, nothing behind.
        grid: Rows and columns.
        window: 1 to ``columns``, or the step at which each row starts, int ``(B, rows)``
            (``ZipARGenerateOutput.starts``).
        eol: Whether each row ends with a token of its own.
        attention_mask: ``(B, N)``, 0 at padding; None: none.

    Returns:
        ``(B, rows, columns, V)``, in the model's dtype; before guidance and logits processors.

    Raises:
        ConfigError: If the grid does not fit ``input_ids``, the window not the grid, or the attention takes no mask.

    Source: ZipAR, arXiv 2412.04062. Our choice: one forward under ``masks.zipar``; where rows have no end, the
    copies that lead in each row follow the grid as tokens of their own.
    """
    rows, columns = check_grid(grid, None)
    line = columns + bool(eol)
    prefix = input_ids.shape[1] - rows * line
    require(prefix > 0, "input_ids", f"hold a prompt and {rows} rows of {line} tokens", tuple(input_ids.shape))
    mask_mod = zipar(prefix, rows, columns, window, eol=eol, device=input_ids.device)
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = (valid.cumsum(dim=1) - 1).clamp(min=0)
    if not eol:
        ends = prefix + columns * torch.arange(1, rows, device=input_ids.device) - 1
        copied = _copied(input_ids[:, prefix:], row_starts(rows, columns, window, input_ids.device), columns)
        input_ids = torch.cat([input_ids, copied], dim=1)
        positions = torch.cat([positions, positions[:, ends]], dim=1)
        valid = torch.cat([valid, valid.new_ones(copied.shape)], dim=1)
    every_row = isinstance(window, Tensor) or attention_mask is not None
    mask_mod = mask_mod if attention_mask is None else _with_padding(mask_mod, valid.bool())
    tokens = input_ids.shape[1]
    attention = attention_of(model.config.get_text_config(decoder=True))
    batch = len(input_ids) if every_row else 1
    mask = in_form(attention, mask_mod, batch, tokens, tokens, input_ids.device, model.dtype)
    logits: Tensor = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    grid_logits = logits[:, _predictors(prefix, rows, columns, eol, input_ids.device)]
    return grid_logits.view(len(input_ids), rows, columns, -1)


def zipar_loss(
    model: Any,
    input_ids: Tensor,
    grid: Sequence[int],
    window: int | Tensor | None = None,
    *,
    eol: bool,
    attention_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the grid's tokens as ``zipar_generate`` would draw them.

    Args:
        model: A causal LM of transformers.
        input_ids: As ``zipar_logits`` takes it.
        grid: Rows and columns.
        window: As in ``zipar_logits``; None draws one of 1 to ``columns`` for this call, from torch's generator.
            A model trained so decodes under any window.
        eol: Whether each row ends with a token of its own; those ends are known and do not count.
        attention_mask: ``(B, N)``, 0 at padding; None: none.
        reduction: ``"mean"``, or ``"none"`` for each token's.

    Returns:
        In nats: a scalar, or ``(B, rows, columns)``, whose sum is an image's exact negative log-likelihood.

    Raises:
        ConfigError: As ``zipar_logits``, or for an unknown ``reduction``.

    Our choice: training under random windows; the paper trains no model.
    """
    require(reduction in REDUCTIONS, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction)
    rows, columns = check_grid(grid, None)
    window = int(torch.randint(1, columns + 1, ())) if window is None else window
    logits = zipar_logits(model, input_ids, grid, window, eol=eol, attention_mask=attention_mask)
    line = columns + bool(eol)
    targets = input_ids[:, -rows * line :].unflatten(1, (rows, line))[..., :columns]
    return F.cross_entropy(logits.movedim(-1, 1).float(), targets, reduction=reduction)


def _copied(grid: Tensor, starts: Tensor, columns: int) -> Tensor:
    """``(B, rows - 1)``: of each row but the last, the latest token there is when the next row starts."""
    columns_there = (starts[..., 1:] - starts[..., :-1]).long() - 1
    rows = torch.arange(columns_there.shape[-1], device=grid.device)
    return grid.gather(1, (rows * columns + columns_there).expand(len(grid), -1))


def _predictors(prefix: int, rows: int, columns: int, eol: bool, device: torch.device) -> Tensor:
    """int64 ``(rows * columns,)``: the token of the sequence whose logits predict each token of the grid."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    before = prefix + row * (columns + bool(eol)) + column - 1
    if not eol:
        copies = prefix + rows * columns + row - 1
        before = torch.where((column == 0) & (row > 0), copies, before)
    return before.flatten()


def _with_padding(mask_mod: MaskMod, valid: Tensor) -> MaskMod:
    """No key at padding; a padded query sees itself, for a row without keys may become NaN."""

    def padded_query(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx == kv_idx) & ~valid[b, q_idx]

    return union(intersect(mask_mod, padding(valid)), padded_query)
